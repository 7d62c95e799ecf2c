"""A run that survives anything: workers, nodes, drivers and storage fail while it trains, and nothing is to be seen.

Every scenario runs the product's own command, `vlmo pretrain`, on several raylets of this machine, with its data and
its run behind a proxy that can fail. The oracle is one undisturbed run in one process: in float64 every step's
figures and the final weights agree to 1e-9, and the audit is clean. What concerns bytes alone (damaged records,
checkpoints, a full disk) is tested on the loop, here and in `train/test_checkpoints.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from chaos_run import EVERY, Command, Place, chaos_place, config_of
from PIL import Image
from small_run import job

from vlmo_ray.config import Phase
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.scenes.records import records
from vlmo_ray.data.store import Store
from vlmo_ray.train.audit import audit
from vlmo_ray.train.checkpoints import Checkpoints
from vlmo_ray.train.loop import Notice, train
from vlmo_ray.train.meters import read_metrics

pytestmark = pytest.mark.slow
raylets = pytest.mark.chaos

STEPS = 100
CONFIG = config_of(STEPS)


@pytest.fixture(scope="module")
def place(s3_server) -> Iterator[Place]:
    with chaos_place(s3_server["AWS_ENDPOINT_URL"], "s3://vlmo/chaos", STEPS) as here:
        yield here


@pytest.fixture
def command(place, request, tmp_path) -> Iterator[Command]:
    started = Command(place, request.node.name.removeprefix("test_"), tmp_path)
    yield started
    started.end()


@raylets
def test_a_worker_is_killed_and_a_second_run_of_the_name_refused(place, command):
    place.want_nodes(2)
    command.start()
    reached = command.reach(2 * EVERY)
    second = Command(place, command.name, command.folder)
    victim = command.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    second.start()
    assert second.process.wait(60) == 2
    assert "is already being trained, by process" in second.lines[-1], second.output
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    command.finish()
    assert re.search(r"resumed at step (\d+) on 2 workers", command.output)
    assert all(step > reached for step in command.repeated())


@raylets
def test_nodes_come_and_go(place, command):
    """2 -> 1 -> 3 -> 2 workers: a node killed, two added, one killed."""
    place.want_nodes(2)
    command.start()
    command.reach(EVERY)
    place.want_nodes(1)
    command.wait_for_workers(1)
    place.want_nodes(3)
    while len(command.workers()) < 3:
        command.rest_until_resized()
    command.wait_for_workers(3)
    place.want_nodes(2)
    command.wait_for_workers(2)
    command.finish()
    assert [size for size in command.sizes() if size != 2] == [1, 3] and command.sizes()[-1] == 2


@raylets
def test_a_node_is_drained_with_notice(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(2 * EVERY)
    node = place.running.pop()
    place.nodes.drain(node, 60)
    try:
        command.finish()
    finally:
        place.nodes.kill(node)
    left, went_on = (re.search(rf"{w} step (\d+)", command.output)[1] for w in ("preempted at", "resumed at"))
    assert left == went_on and command.repeated() == []
    assert command.sizes() == [2, 1]


READS_ON_A_DRAINING_NODE = """
import sys
import ray
from vlmo_ray.config import DataConfig
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.order import Schedule
from vlmo_ray.data.pipeline import PairStream

node, data = sys.argv[1:]
ray.init(log_to_driver=False)

@ray.remote(num_cpus=2, label_selector={"ray.io/node-id": node})
class Worker:
    def begin(self):
        shape = {"image_size": 16, "max_text_len": 12, "vocab_size": 30522, "schedule": Schedule(((60, 12),), 2)}
        stream = PairStream(
            load_manifest(data), DataConfig(group_steps=3), **shape, seed=1, start=0, stop=60, window_groups=1
        )
        self.batches = iter(stream)
        next(self.batches)

    def rest(self):
        return sum(len(batch) for batch in self.batches)

worker = Worker.remote()
ray.get(worker.begin.remote())
print("ready", flush=True)
sys.stdin.readline()
print(ray.get(worker.rest.remote(), timeout=50), flush=True)
"""


@raylets
def test_a_worker_on_a_draining_node_still_gets_its_data(place):
    """The node takes no tasks any more, and all but the first windows are still to be read."""
    place.want_nodes(2)
    node = place.running.pop()
    script = [sys.executable, "-c", READS_ON_A_DRAINING_NODE, node, place.data]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        with subprocess.Popen(script, env=place.environment, **pipes) as reader:
            assert "ready" in iter(lambda: reader.stdout.readline().strip() or "ended", "ended")
            place.nodes.drain(node, 60)
            found, _ = reader.communicate("\n", timeout=60)
        assert found.split()[-1:] == [str(59 * 12)]
    finally:
        place.nodes.kill(node)


@raylets
def test_the_driver_is_stopped_and_killed_and_the_command_run_again(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(2 * EVERY)
    command.process.terminate()
    assert command.process.wait(60) == 2, command.output
    assert "saved and ended on request; the same command goes on from here" in command.lines[-1]
    command.start()
    reached = command.reach(5 * EVERY)
    assert command.repeated() == []
    command.process.kill()
    command.process.wait()
    command.lines.clear()
    command.start()
    command.wait_for(lambda: "Requesting resources" in command.output, "a reservation")
    command.process.kill()  # before it has workers
    command.process.wait()
    assert not re.search(r"worker \d+ of \d+: process", command.output)
    command.lines.clear()
    command.start()
    # in less than the 180 s that Ray would wait for the reservations of the dead
    command.wait_for(lambda: "resumed at step" in command.output, "resumption", 60)
    command.finish()
    assert int(re.search(r"resumed at step (\d+)", command.output)[1]) >= reached


@raylets
def test_storage_is_busy_slow_cut_off_and_away(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(EVERY)
    place.faults.busy, place.faults.slow, place.faults.cut, place.faults.delay_s = 0.3, 0.05, 0.2, 2.0
    try:
        command.reach(3 * EVERY)
        place.faults.away = True
        time.sleep(20)
        place.faults.away = False
        command.reach(4 * EVERY)
        struck = dict(place.faults.struck)
    finally:
        place.faults.busy = place.faults.slow = place.faults.cut = 0.0
        place.faults.away = False
    assert min(struck[kind] for kind in ("busy", "slow", "cut", "away")) > 0, struck
    command.finish()
    assert command.repeated() == []


def test_damaged_records_and_shards_are_masked_to_the_row(tmp_path, monkeypatch):
    """A truncated shard, a flipped byte in a page, a corrupt JPEG, a caption that is not text, 100 megapixels."""
    monkeypatch.setitem(read_chunk.__kwdefaults__, "wait_s", 0.01)  # before a shard is tried again
    rows = list(records(7, 120, image_size=16))
    rows[3]["image"] = rows[3]["image"][:40]
    rows[31]["text"] = b"\xff\xfe".decode("latin-1") * 2 + "\x00"
    huge = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(huge, "PNG")
    rows[52]["image"] = huge.getvalue()
    rows[33]["text"] = "  "
    data = str(tmp_path / "data")
    write_dataset(data, rows, rows_per_group=10, groups_per_shard=2)
    shards = sorted(path for path in Path(data).rglob("*.parquet") if path.name != "manifest.parquet")
    shards[4].write_bytes(shards[4].read_bytes()[:-400])  # both of its groups
    flipped = bytearray(shards[5].read_bytes())
    flipped[300] ^= 1  # in the first of two groups
    shards[5].write_bytes(flipped)
    config = dataclasses.replace(
        CONFIG, phases=(Phase(20, 12),), data=dataclasses.replace(CONFIG.data, bad_shards="mask")
    )
    outcome = train(job(data, tmp_path / "run", config))  # two epochs
    assert outcome.step == 20, outcome
    found = audit(str(tmp_path / "run"), data)
    assert found.clean and [epoch.complete for epoch in found.epochs] == [True, True]
    assert len({epoch.masked for epoch in found.epochs}) == 1 and 30 < found.epochs[0].masked <= 34

    stopped = train(job(data, tmp_path / "strict", dataclasses.replace(config, data=CONFIG.data)))
    assert shards[4].name in stopped.stopped or shards[5].name in stopped.stopped


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Makes `folder` one of 50 MB; how to fill it up, and how to free it.

    Where none can be mounted: no file of this process may be larger than 500 kB, a fraction of a checkpoint.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:

        def fill() -> None:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 16))

        try:
            yield fill, (folder / "filler").unlink
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield functools.partial(limit, (500_000, free[1])), functools.partial(limit, free)
        finally:
            limit(free)


def test_the_disk_is_full_while_checkpoints_are_written(scenes, tmp_path, monkeypatch, capsys):
    folder, config = (
        tmp_path / "small",
        dataclasses.replace(CONFIG, phases=(Phase(40, 12),), checkpoint_every=5),
    )
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, notice_every=1))
    assert train(job(scenes, tmp_path / "undisturbed", config)).step == 40
    with small_disk(folder) as (fill, free):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        asked = []

        def notice() -> Notice:
            asked.append(1)
            if len(asked) == 12:  # full at the checkpoints of steps 15 and 20
                fill()
            elif len(asked) == 23:
                free()
            return Notice.NONE

        assert train(job(scenes, tmp_path / "run", config), notice=notice).step == 40
    printed = capsys.readouterr().out
    assert printed.count(f"MB are free in {folder}") == printed.count("the run goes on") == 2, printed
    curves = [
        [m["loss"] for m in read_metrics(Store(str(tmp_path / run)))[0]] for run in ("run", "undisturbed")
    ]
    np.testing.assert_allclose(*curves, rtol=1e-9)
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000040")
    assert Checkpoints(Store(str(tmp_path / "run"))).newest().step == 35
