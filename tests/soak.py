"""Runs with faults at random, one after another, each compared with the undisturbed run.

    python tests/soak.py [--minutes 30] [--seed 0] [--steps 400] [--out FILE]

The faults, and the pauses between them, are drawn from the seed. A run passes if every step's figures and the final
weights are those of the undisturbed run in one process (float64, 1e-9) and its audit is clean. Exits with 1 if one does
not pass.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from chaos_run import EVERY, Command, Place, chaos_place
from report import publish, table

from vlmo_ray.demo.local_s3 import local_s3
from vlmo_ray.runs.checkpoints import Checkpoints, name_of

PAUSE_S = 10, 30  # between a fault that is over and the next
NOTICE_S = 30


@dataclass
class Round:
    """One run: what struck it, and what came of it."""

    place: Place
    command: Command
    chance: random.Random
    struck: list[str] = field(default_factory=list)
    leaving: list[tuple[float, str]] = field(default_factory=list)  # nodes with notice, and when they go

    # ---- the faults; each returns when it has struck ----

    def worker_killed(self) -> None:
        self.command.wait_for(lambda: any(map(alive, self.command.workers())), "a worker")
        os.kill(self.chance.choice([pid for pid in self.command.workers() if alive(pid)]), signal.SIGKILL)

    def node_killed(self) -> None:
        self.place.running.insert(0, self.place.running.pop())  # any of them
        self.place.want_nodes(len(self.place.running) - 1)

    def node_added(self) -> None:
        self.place.want_nodes(len(self.place.running) + 1)

    def node_drained(self) -> None:
        node = self.place.running.pop(0)
        self.leaving.append((time.monotonic() + NOTICE_S, node))
        self.place.nodes.drain(node, NOTICE_S)

    def driver_killed(self) -> None:
        self.command.process.kill()
        self.command.process.wait()
        self.command.start()

    def driver_asked_to_stop(self) -> None:
        self.command.process.terminate()
        assert self.command.process.wait(90) == 2, "SIGTERM did not end with the sentence"
        self.command.start()

    def storage_busy(self) -> None:
        self._storage(20, busy=0.3, slow=0.05, cut=0.2)

    def storage_away(self) -> None:
        self._storage(15, away=True)

    def checkpoint_damaged(self) -> None:
        """And a worker killed, so that it is read."""
        self.command.wait_for(lambda: any(map(alive, self.command.workers())), "a worker")
        run, workers = self.command.run, [pid for pid in self.command.workers() if alive(pid)]
        for pid in workers:  # or a newer one might be there before it is damaged
            os.kill(pid, signal.SIGSTOP)
        state = Checkpoints(run).newest()
        folder = name_of(state.step)
        name = max(name for name in run.list(f"{folder}/{state.attempt}/") if name.endswith(".distcp"))
        data = bytearray(run.read(name))
        data[self.chance.randrange(len(data))] ^= 1
        run.write(name, bytes(data))
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self.command.wait_for(lambda: re.search(f"{folder}.*damaged", self.command.output), "the damage to be told")

    def _storage(self, seconds: float, **faults: float) -> None:
        for name, value in faults.items():
            setattr(self.place.faults, name, value)
        time.sleep(seconds)
        for name, value in faults.items():
            setattr(self.place.faults, name, type(value)(0))

    def possible(self) -> list[str]:
        nodes = len(self.place.running)
        fewer = ["node_killed", "node_drained"] if nodes > 1 else []
        more = ["node_added"] if nodes < 3 else []
        others = "worker_killed driver_killed driver_asked_to_stop storage_busy storage_away checkpoint_damaged"
        return fewer + more + others.split()

    # ---- the run ----

    def play(self) -> str:
        """Verdict, in a word or a sentence."""
        self.place.want_nodes(2)
        try:
            self.command.start()
            self.command.reach(EVERY)
            while not self._finished_within(self.chance.uniform(*PAUSE_S)):
                if self.place.steps - self.command.committed() < 4 * EVERY or not self.command.workers():
                    continue
                fault = self.chance.choice(self.possible())
                print(f"{time.strftime('%X')} step {self.command.committed()}: {fault}", flush=True)
                self.struck.append(fault)
                getattr(self, fault)()
            self.command.finish(300)
        except Exception as error:
            traceback.print_exc()
            return f"FAILED: {str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__}"
        finally:
            self.command.end()
            self._leave(time.monotonic() + NOTICE_S)
        return "passed"

    def _leave(self, now: float) -> None:
        for when, node in list(self.leaving):
            if when <= now:
                self.place.nodes.kill(node)
                self.leaving.remove((when, node))

    def _finished_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._leave(time.monotonic())
            if self.command.process.poll() is not None:
                return True
            time.sleep(0.2)
        return False


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    rows, failed, until = [], 0, time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3"), ("soak",)) as env:
        os.environ.update(env)
        with chaos_place(env["AWS_ENDPOINT_URL"], "s3://soak/soak", given.steps) as place:
            while time.monotonic() < until:
                number = len(rows)
                chance = random.Random(f"{given.seed} {number}")
                began, struck = time.monotonic(), dict(place.faults.struck)
                round_ = Round(place, Command(place, f"round{number}", Path(folder)), chance)
                verdict = round_.play()
                failed += verdict != "passed"
                bad = {kind: n - struck.get(kind, 0) for kind, n in place.faults.struck.items()}
                answers = ", ".join(f"{n} {kind}" for kind, n in bad.items() if n)
                rows.append([
                    str(number), verdict, ", ".join(round_.struck), answers,
                    "-".join(map(str, round_.command.sizes())), str(len(round_.command.repeated())),
                    str(len(list(Checkpoints(round_.command.run).complete()))), f"{time.monotonic() - began:.0f}",
                ])  # fmt: skip
                print(rows[-1], flush=True)
    head = ["run", "verdict", "faults", "bad answers of storage", "workers", "steps repeated", "checkpoints kept", "s"]
    count = sum(len(row[2].split(", ")) for row in rows if row[2])
    publish(
        "Runs with faults at random",
        f"Seed {given.seed}; {len(rows)} runs of {given.steps} steps on 1 to 3 raylets, {count} faults; "
        f"{len(rows) - failed} of {len(rows)} passed: every step's figures and the final weights as in the undisturbed "
        f"run (1e-9, float64), every pair once an epoch.\n\n{table(head, rows)}",
        given.out,
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
