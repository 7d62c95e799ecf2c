"""The time until the next optimizer step when nodes come and go, and how many steps are repeated.

    python benchmarks/recovery.py [--out FILE] [--rounds 3]

`vlmo train` runs on raylets of this machine (2 CPUs each, one worker per node) with data and checkpoints in an S3
server. Each round kills a worker process, kills a node, adds one, gives one notice, and adds one. Times are those at
which lines of the command's output arrive. The model is tiny, so the result excludes the time to read large weights.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos_run import Command, Place, chaos_place
from report import publish, table

from vlmo_ray.demo.local_s3 import local_s3

STEP = re.compile(r"step (\d+)/")


def steps(command: Command) -> list[tuple[float, int]]:
    """(time, number) of each printed step."""
    lines = list(zip(command.times, command.lines, strict=False))
    return [(when, int(found[1])) for when, line in lines if (found := STEP.search(line))]


def disturb(place: Place, command: Command, kind: str) -> dict[str, float]:
    """Seconds from the disturbance to the next step, seconds between two steps, and the number of repeated steps."""
    workers = command.workers()
    command.wait_for(lambda: steps(command)[-1][1] % 10 == 7, "seven steps since a checkpoint")
    began = time.monotonic()
    match kind:
        case "a worker killed":
            os.kill(workers[-1], signal.SIGKILL)
        case "a node killed":
            place.want_nodes(len(place.running) - 1)
        case "a node added":
            place.want_nodes(len(place.running) + 1)
        case "a node with notice":
            node = place.running.pop()
            place.nodes.drain(node, 60)
    command.wait_for(lambda: command.workers() != workers, "a new start")
    command.wait_for(lambda: _after(command, began), "the next step")
    last, first = _after(command, began)
    if kind == "a node with notice":
        place.nodes.kill(node)
    return {"until": first[0] - began, "still": first[0] - last[0], "again": last[1] - first[1] + 1}


def _after(command: Command, began: float) -> tuple[tuple[float, int], tuple[float, int]] | None:
    """The last step of the old workers and the first step of the new ones, which print first where they resumed."""
    lines = list(zip(command.times, command.lines, strict=False))
    starts = [when for when, line in lines if "resumed at step" in line and when > began]
    if not starts or not (new := [found for found in steps(command) if found[0] > starts[-1]]):
        return None
    return [found for found in steps(command) if found[0] < starts[-1]][-1], new[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found = defaultdict(list)
    kinds = ["a worker killed", "a node killed", "a node added", "a node with notice", "a node added"]
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3"), ("bench",)) as env:
        os.environ.update(env)
        with chaos_place(env["AWS_ENDPOINT_URL"], "s3://bench/recovery", 100_000, log_every=1) as place:
            place.want_nodes(2)
            command = Command(place, "recovery", Path(folder))
            try:
                command.start()
                command.reach(20)
                for _ in range(given.rounds):
                    for kind in kinds:
                        found[kind].append(disturb(place, command, kind))
                        print(kind, found[kind][-1], flush=True)
                        time.sleep(10)
            finally:
                command.end()
    rows = []
    for kind, times in found.items():
        until, still = ([f"{value:.0f}" for value in sorted(t[name] for t in times)] for name in ("until", "still"))
        again = [str(int(t["again"])) for t in times]
        rows.append([kind, ", ".join(until), ", ".join(still), ", ".join(again)])
    killed = [t["until"] for t in found["a node killed"]]
    notice = max(t["again"] for t in found["a node with notice"])
    publish(
        "Recovery",
        "Checkpoints every 10 steps; each disturbance is 7 steps after one. Ray notices a lost node after 3 s "
        "(`RAY_health_check_*`; the default is some 15 s). The run checks for a notice every second, and for room for "
        "more workers every 3 s. Idle processes stay, as on nodes with many CPUs. 'Until the next step' is from the "
        "disturbance; for an added node, from the command that starts it.\n\n"
        + table(["", "s until the next step", "s without a step", "repeated steps"], rows)
        + f"\n\n- from the kill of a node to the next step, target under 45 s: {max(killed):.0f} s at worst, "
        f"{statistics.median(killed):.0f} s in the median, {'met' if max(killed) < 45 else 'NOT met'}\n"
        f"- repeated steps after a notice, target 0: {notice:.0f}, {'met' if notice == 0 else 'NOT met'}",
        given.out,
    )


if __name__ == "__main__":
    main()
