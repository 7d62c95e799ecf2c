"""Two disturbed runs on several raylets: everything that can happen to workers in one, failing storage in the other.

`test_chaos.py` has each fault alone, and more of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from chaos_run import EVERY, Command, Place, chaos_place

STEPS = 80
pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def place(s3_server) -> Iterator[Place]:
    with chaos_place(s3_server["AWS_ENDPOINT_URL"], "s3://vlmo/chaos-short", STEPS, lost_after_s=20) as here:
        yield here


@pytest.fixture
def command(place, request, tmp_path) -> Iterator[Command]:
    started = Command(place, request.node.name.removeprefix("test_"), tmp_path)
    yield started
    started.end()


def test_a_worker_is_killed_a_node_added_and_a_node_drained(place, command):
    """2 workers, one of them killed; a third node; then one node is taken away with notice."""
    place.want_nodes(2)
    command.start()
    reached = command.reach(EVERY)
    killed = command.workers()
    os.kill(killed[-1], signal.SIGKILL)
    command.wait_for(lambda: set(command.workers()).isdisjoint(killed), "a new start")
    place.want_nodes(3)
    while len(command.workers()) < 3:
        command.rest_until_resized()
    command.wait_for_workers(3)
    node = place.running.pop()
    place.nodes.drain(node, 60)
    try:
        command.finish()
    finally:
        place.nodes.kill(node)
    assert command.sizes()[0] == 2 and 3 in command.sizes() and command.sizes()[-1] == 2
    assert all(step > reached for step in command.repeated())
    # nobody lost a step but by the kill
    assert command.resumed_where_ended() >= 2
    assert "saved, to go on with more workers" in command.output
    assert "saved, to go on without the node that is being taken away" in command.output


@pytest.mark.full  # `tests/runs/test_checkpoints.py` has it without Ray
def test_storage_fails(place, command):
    """Busy, slow and cut off, then away for a while."""
    place.want_nodes(2)
    command.start()
    command.reach(EVERY)
    place.faults.busy, place.faults.slow, place.faults.cut, place.faults.delay_s = 0.2, 0.05, 0.2, 1.0
    try:
        command.reach(2 * EVERY)
        place.faults.away = True
        time.sleep(6)
        place.faults.away = False
        command.reach(3 * EVERY)
        struck = dict(place.faults.struck)
    finally:
        place.faults.busy = place.faults.slow = place.faults.cut = 0.0
        place.faults.away = False
    assert min(struck[kind] for kind in ("busy", "slow", "cut", "away")) > 0, struck
    command.finish()
    assert command.repeated() == [], command.output[-6000:]
