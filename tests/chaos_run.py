"""Runs that are disturbed: the product's own command on several raylets of this machine, behind a proxy that fails.

The oracle is an undisturbed run in one process: in float64 every step's figures and the final weights agree to 1e-9.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from chaos_cluster import Nodes, nodes
from faulty_s3 import Faults, faulty_s3
from safetensors.torch import load
from small_run import SMALL, job

from vlmo_ray.config import Config, OptimConfig, Phase, ineffective
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.overrides import to_dict
from vlmo_ray.report.facts import read_facts
from vlmo_ray.runs.audit import audit
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

EVERY = 10
# A node has 2 CPUs: one worker each.
CLUSTER = {
    "max_workers": 3, "gpus_per_worker": 0, "cpus_per_worker": 0.5, "data_cpus_per_worker": 1,
    "resize_interval_s": 3, "notice_every": 2,
}  # fmt: skip
RESIZED = "workers save and start again"  # what the driver prints when there is room for more
STARTING = "Attempting to start training worker group"  # what Ray Train logs at every start
FIGURES = ("step", "samples", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm")


def config_of(steps: int) -> Config:
    """All three objectives, in float64, and two phases."""
    first = 2 * steps // 5
    return dataclasses.replace(
        SMALL, name="tiny", model=dataclasses.replace(SMALL.model, width=8, vocab_size=30522),
        phases=(Phase(first, 8), Phase(steps - first, 12)), optim=OptimConfig(peak_lr=1e-3, warmup_steps=5),
        checkpoint_every=EVERY, log_every=5, precision="float64", audit=True,
    )  # fmt: skip


@dataclasses.dataclass
class Place:
    """Where runs take place: a cluster, a bucket behind a proxy, a data set, and what every run should give."""

    nodes: Nodes
    faults: Faults
    environment: dict[str, str]
    config: Config
    data: str
    running: list[str]  # ids of the nodes that are up

    @property
    def steps(self) -> int:
        return self.config.total_steps

    @functools.cached_property
    def undisturbed(self) -> Store:
        """The run of one process that nothing happens to."""
        run = f"{self.data.rpartition('/')[0]}/undisturbed"
        with contextlib.redirect_stdout(None):
            assert train(job(self.data, run, self.config)).step == self.steps
        return Store(run)

    def want_nodes(self, count: int) -> None:
        while len(self.running) < count:
            self.running.append(self.nodes.add())
        while len(self.running) > count:
            self.nodes.kill(self.running.pop())


@contextlib.contextmanager
def chaos_place(endpoint: str, bucket: str, steps: int, lost_after_s: int = 3, **changes) -> Iterator[Place]:
    """A place without nodes yet, whose data and runs are under `bucket` of the S3 server at `endpoint`.

    A node that does not answer for `lost_after_s` counts as lost, which by default takes Ray some 15 s.
    The AWS variables of this process must be set for that server.
    """
    config = dataclasses.replace(config_of(steps), **changes)
    scenes = list(records(7, 500, image_size=16))
    scenes[77]["image"] = b"no image"  # which every run has to mask
    write_dataset(f"{bucket}/data", scenes, rows_per_group=20, groups_per_shard=5)
    with faulty_s3(endpoint) as (faulty, faults):
        environment = os.environ | {
            "AWS_ENDPOINT_URL": faulty,
            "PYTHONUNBUFFERED": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "RAY_prestart_worker_first_driver": "0",  # no idle processes for CPUs that are not there
            # a node of many CPUs keeps the processes that rest between two windows; with 2 CPUs Ray ends them after 1 s
            "RAY_idle_worker_killing_time_threshold_ms": "600000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": str(lost_after_s),
        }
        with nodes(environment) as cluster:
            environment["RAY_ADDRESS"] = cluster.address
            yield Place(cluster, faults, environment, config, f"{bucket}/data", [])


def settings(config: Config) -> list[str]:
    """`config` as `--set` options for the recipe `tiny`."""
    flat = {}
    for name, value in to_dict(config).items():
        if name == "cluster":
            continue
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= inner
    flat |= {f"cluster.{name}": value for name, value in CLUSTER.items()}
    silent = {"version", "task.kind", "evaluate_every", "name", "model.init_logit_bias", "init", *ineffective(config)}
    return [f"--set={k}={json.dumps(v)}" for k, v in flat.items() if k not in silent]


class Command:
    """`vlmo train`, started as often as a scenario wants; its output is read as it comes."""

    def __init__(self, place: Place, name: str, folder: Path):
        self.place, self.name, self.folder = place, name, folder
        self.storage = f"{place.data.rpartition('/')[0]}/runs"
        self.run = Store(f"{self.storage}/{name}")
        self.lines: list[str] = []
        self.times: list[float] = []  # when each line came, by time.monotonic
        self.process: subprocess.Popen | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "vlmo_ray", "train", "tiny", "--data", self.place.data]
        command += ["--storage", self.storage, "--name", self.name, *settings(self.place.config), *more]
        self.process = subprocess.Popen(
            command,
            env=self.place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.times.append(time.monotonic())
            self.lines.append(re.sub(r"\x1b\[\d+m", "", line).rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, what: Callable[[], object], why: str, seconds: float = 120) -> object:
        until = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, f"ended before {why}:\n{self.output[-6000:]}"
            assert time.monotonic() < until, f"no {why} in {seconds} s:\n{self.output[-6000:]}"
            time.sleep(0.3)
        return found

    def committed(self) -> int:
        state = Checkpoints(self.run).newest()
        return state.step if state else 0

    def reach(self, step: int) -> int:
        """Waits for a checkpoint at `step` or later; its step, which leaves most of the run to come."""
        self.wait_for(lambda: self.committed() >= step, f"checkpoint at step {step}")
        reached = self.committed()
        assert reached < self.place.steps - EVERY, "the run is almost over: nothing left to disturb"
        return reached

    def workers(self) -> list[int]:
        """Process ids of the newest start's workers, by rank."""
        found = re.findall(r"worker (\d+) of (\d+): process (\d+) on", self.output)
        count = int(found[-1][1])
        return [int(pid) for _, _, pid in sorted(found[-count:], key=lambda match: int(match[0]))]

    def sizes(self) -> list[int]:
        """Numbers of workers, in the order in which the run had them."""
        counts = [m["workers"] for m in read_metrics(self.run)[0]]
        return [int(n) for i, n in enumerate(counts) if i == 0 or counts[i - 1] != n]

    def wait_for_workers(self, count: int) -> None:
        """Waits for a start with `count` workers and a checkpoint of theirs."""
        self.wait_for(lambda: len(self.workers()) == count, f"{count} workers", 180)
        before = self.committed()
        self.wait_for(lambda: self.committed() > before, f"a checkpoint with {count} workers", 180)

    def rest_until_resized(self) -> None:
        """The workers do nothing until the driver has noticed new nodes; the run might be over by then."""
        workers = self.workers()

        def tell(number: signal.Signals) -> None:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):  # it has just ended, to be resized
                    os.kill(pid, number)

        tell(signal.SIGSTOP)
        try:
            self.wait_for(lambda: self.output.rfind(RESIZED) > self.output.rfind(STARTING), "a resize")
        finally:
            tell(signal.SIGCONT)
        self.wait_for(lambda: self.workers() != workers, "a new start")

    def finish(self, seconds: float = 240) -> None:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished in {seconds} s:\n{self.output[-6000:]}") from None
        assert code == 0, f"exit code {code}:\n{self.output[-6000:]}"
        found, _ = read_metrics(self.run)
        wanted, _ = read_metrics(self.place.undisturbed)
        assert [m["step"] for m in found] == list(range(1, self.place.steps + 1))
        for name in FIGURES:
            values = [[m[name] for m in metrics] for metrics in (found, wanted)]
            np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-9, err_msg=name)
        weights = [load(store.read("model/model.safetensors")) for store in (self.run, self.place.undisturbed)]
        for name, value in weights[1].items():
            torch.testing.assert_close(weights[0][name], value, rtol=1e-9, atol=1e-9, msg=name)
        found = audit(self.run.uri, self.place.data)
        assert found.clean, found.sentences()
        self.check_report()

    def check_report(self) -> None:
        """The report of the run tells what happened to it."""
        facts = read_facts(self.run.uri)
        assert facts.state == "finished" and self.run.exists("report.html")
        again = {step for first, last in facts.curves.repeated for step in range(first, last + 1)}
        assert again == set(self.repeated())
        assert [number for _, number in facts.curves.workers] == self.sizes()
        masked = {reason: found.count for reason, found in facts.masked.items()}
        told = sum(m["masked_rows"] for m in read_metrics(self.run)[0])
        assert sum(masked.values()) >= told and bool(masked) == (told > 0), masked  # of steps done twice, perhaps twice
        assert all("not an image" in reason for reason in masked)

    def resumed_where_ended(self) -> int:
        """How often workers ended to be started again by others, each time with no step in between."""
        ends = list(re.finditer(r"the workers ended at step (\d+)", self.output))
        for end in ends:
            assert re.search(r"resumed at step (\d+)", self.output[end.end() :])[1] == end[1]
        return len(ends)

    def repeated(self) -> list[int]:
        return read_metrics(self.run)[1]

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
