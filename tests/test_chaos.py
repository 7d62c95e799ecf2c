"""A run that survives anything: workers, nodes, drivers and storage fail while it trains, and nothing is to be seen.

Every scenario runs the product's own command, `vlmo pretrain`, on several raylets of this machine, with its data and
its run behind a proxy that can fail. The oracle is one undisturbed run in one process: in float64 every step's
figures and the final weights agree to 1e-9, and the audit is clean. What concerns bytes alone (damaged records,
checkpoints, a full disk) is tested on the loop, here and in `train/test_checkpoints.py`.

The scenarios on raylets run with `pytest -m chaos`: on two cores each takes minutes, and not all of them pass yet
(docs/log.md says which).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from chaos_cluster import Nodes, nodes
from faulty_s3 import Faults, faulty_s3
from PIL import Image
from safetensors.torch import load
from small_run import SMALL, job

from vlmo_ray.config import OptimConfig, Phase
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.scenes.records import records
from vlmo_ray.data.store import Store
from vlmo_ray.settings import to_dict
from vlmo_ray.train.audit import audit
from vlmo_ray.train.checkpoints import Checkpoints
from vlmo_ray.train.loop import Notice, train
from vlmo_ray.train.meters import read_metrics

pytestmark = pytest.mark.slow
raylets = pytest.mark.chaos

STEPS, EVERY = 160, 10
CONFIG = dataclasses.replace(
    SMALL, name="tiny", model=dataclasses.replace(SMALL.model, width=8),  # most of a checkpoint is words x width
    phases=(Phase(STEPS, 12),), optim=OptimConfig(peak_lr=1e-3, warmup_steps=5),
    checkpoint_every=EVERY, log_every=5, precision="float64", audit=True,
)  # fmt: skip
# Nodes claim 20 CPUs each; with at most 3 workers these shares put one worker on a node. Data gets whole CPUs: Ray
# divides what is left of a node among pipelines by integer division, and gives nothing of less than one each.
CLUSTER = {
    "max_workers": 3, "gpus_per_worker": 0, "cpus_per_worker": 10.5, "data_cpus_per_worker": 1,
    "start_timeout_s": 20, "resize_interval_s": 3, "notice_every": 2,
}  # fmt: skip
FIGURES = ("step", "samples", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm")


@dataclasses.dataclass
class Place:
    """Where all scenarios take place."""

    nodes: Nodes
    faults: Faults
    environment: dict[str, str]
    data: str
    undisturbed: Store
    running: list[str]  # ids of the nodes that are up

    def want_nodes(self, count: int) -> None:
        while len(self.running) < count:
            self.running.append(self.nodes.add())
        while len(self.running) > count:
            self.nodes.kill(self.running.pop())


@pytest.fixture(scope="module")
def place(s3_server, tmp_path_factory) -> Iterator[Place]:
    bucket = "s3://vlmo/chaos"
    write_dataset(f"{bucket}/data", records(7, 500, image_size=16), rows_per_group=20, groups_per_shard=5)
    undisturbed = f"{bucket}/undisturbed"
    assert train(job(f"{bucket}/data", undisturbed, CONFIG)).step == STEPS
    with faulty_s3(s3_server["AWS_ENDPOINT_URL"]) as (endpoint, faults):
        environment = os.environ | {
            "AWS_ENDPOINT_URL": endpoint,
            "PYTHONUNBUFFERED": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "RAY_prestart_worker_first_driver": "0",  # no idle processes for CPUs that are not there
            # a lost node is noticed after 3 s; by default it takes some 15
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        with nodes(environment) as cluster:
            environment["RAY_ADDRESS"] = cluster.address
            yield Place(cluster, faults, environment, f"{bucket}/data", Store(undisturbed), [])


@pytest.fixture
def command(place, request, tmp_path) -> Iterator[Command]:
    started = Command(place, request.node.name.removeprefix("test_"), tmp_path)
    yield started
    started.end()


def settings() -> list[str]:
    """The config of the undisturbed run as `--set` options for the recipe `tiny`."""
    flat = {}
    for name, value in to_dict(CONFIG).items():
        if name == "cluster":
            continue
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= inner
    flat |= {f"cluster.{name}": value for name, value in CLUSTER.items()}
    silent = ("name", "model.num_answers", "model.init_logit_bias", "init")
    return [f"--set={k}={json.dumps(v)}" for k, v in flat.items() if k not in silent]


class Command:
    """`vlmo pretrain`, started as often as a scenario wants; its output is read as it comes."""

    def __init__(self, place: Place, name: str, folder: Path):
        self.place, self.name, self.folder = place, name, folder
        self.storage = f"{place.data.rpartition('/')[0]}/runs"
        self.run = Store(f"{self.storage}/{name}")
        self.lines: list[str] = []
        self.process: subprocess.Popen | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "vlmo_ray", "pretrain", "tiny", "--data", self.place.data]
        command += ["--storage", self.storage, "--name", self.name, *settings(), *more]
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
            self.lines.append(re.sub(r"\x1b\[\d+m", "", line).rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, what: Callable[[], object], why: str, seconds: float = 120) -> object:
        until = time.monotonic() + seconds
        while not (found := what()):
            assert self.process.poll() is None, f"ended before {why}:\n{self.output[-6000:]}"
            assert time.monotonic() < until, f"no {why} in {seconds} s:\n{self.output[-6000:]}"
            time.sleep(0.1)
        return found

    def committed(self) -> int:
        state = Checkpoints(self.run).newest()
        return state.step if state else 0

    def reach(self, step: int) -> int:
        """Waits for a checkpoint at `step` or later; its step, which leaves most of the run to come."""
        reached = self.wait_for(
            lambda: self.committed() >= step and self.committed(), f"checkpoint at step {step}"
        )
        assert reached < STEPS - EVERY, "the run is almost over: nothing left to disturb"
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
        def there() -> bool:
            starts = re.findall(
                r"(?:resumed at step \d+ on (\d+) workers)|(?:worker 0 of (\d+): )", self.output
            )
            return bool(starts) and int(max(starts[-1])) == count

        self.wait_for(there, f"{count} workers", 180)
        before = self.committed()
        self.wait_for(lambda: self.committed() > before, f"a checkpoint with {count} workers", 180)

    def finish(self, seconds: float = 240) -> None:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished in {seconds} s:\n{self.output[-6000:]}") from None
        assert code == 0, self.output[-6000:]
        found, _ = read_metrics(self.run)
        wanted, _ = read_metrics(self.place.undisturbed)
        assert [m["step"] for m in found] == list(range(1, STEPS + 1))
        for name in FIGURES:
            values = [[m[name] for m in metrics] for metrics in (found, wanted)]
            np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-9, err_msg=name)
        weights = [
            load(store.read("model/model.safetensors")) for store in (self.run, self.place.undisturbed)
        ]
        for name, value in weights[1].items():
            torch.testing.assert_close(weights[0][name], value, rtol=1e-9, atol=1e-9, msg=name)
        found = audit(self.run.uri, self.place.data)
        assert found.clean, found.sentences()

    def repeated(self) -> list[int]:
        return read_metrics(self.run)[1]

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()  # killed, it would leave its reservation to the next scenario
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


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
    place.faults.slow, place.faults.delay_s = 1.0, 0.5  # else the run is over before a new node is noticed
    try:
        command.start()
        command.reach(EVERY)
        for count in (1, 3, 2):
            place.want_nodes(count)
            command.wait_for_workers(count)
    finally:
        place.faults.slow = 0.0
    command.finish()
    assert command.sizes() == [2, 1, 3, 2]


@raylets
def test_a_node_is_drained_with_notice(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(2 * EVERY)
    place.nodes.drain(place.running[-1], 60)
    command.finish()
    place.nodes.kill(place.running.pop())
    left, went_on = (re.search(rf"{w} step (\d+)", command.output)[1] for w in ("preempted at", "resumed at"))
    assert left == went_on and command.repeated() == []
    assert command.sizes() == [2, 1]


@raylets
def test_the_driver_is_killed_and_the_command_run_again(place, command):
    place.want_nodes(2)
    command.start()
    reached = command.reach(2 * EVERY)
    command.process.kill()
    command.process.wait()
    command.lines.clear()
    began = time.monotonic()
    command.start()
    command.wait_for(lambda: "resumed at step" in command.output, "resumption", 60)
    assert time.monotonic() - began < 60, "waited for the reservation of the dead run"
    command.finish()
    assert int(re.search(r"resumed at step (\d+)", command.output)[1]) >= reached


@raylets
def test_sigterm_saves_and_the_command_goes_on(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(2 * EVERY)
    command.process.terminate()
    assert command.process.wait(60) == 2, command.output
    assert "saved and ended on request; the same command goes on from here" in command.lines[-1]
    command.start()
    command.finish()
    assert command.repeated() == []


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


def test_damaged_records_and_shards_are_masked_to_the_row(tmp_path):
    """A truncated shard, a flipped byte in a page, a corrupt JPEG, a caption that is not text, 100 megapixels."""
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


def test_the_disk_is_full_while_checkpoints_are_written(scenes, tmp_path, monkeypatch, capsys):
    folder, config = (
        tmp_path / "small",
        dataclasses.replace(CONFIG, phases=(Phase(40, 12),), checkpoint_every=5),
    )
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, notice_every=1))
    folder.mkdir()
    assert train(job(scenes, tmp_path / "undisturbed", config)).step == 40
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(
            "no small disk can be mounted here; test_checkpoints.py has the same with a made-up error"
        )
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        asked = []

        def notice() -> Notice:
            asked.append(1)
            if len(asked) == 12:  # full at the checkpoints of steps 15 and 20
                with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(1 << 16))
            elif len(asked) == 23:
                (folder / "filler").unlink()
            return Notice.NONE

        assert train(job(scenes, tmp_path / "run", config), notice=notice).step == 40
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    printed = capsys.readouterr().out
    assert printed.count(f"(0 MB are free in {folder}") == printed.count("the run goes on") == 2, printed
    curves = [
        [m["loss"] for m in read_metrics(Store(str(tmp_path / run)))[0]] for run in ("run", "undisturbed")
    ]
    np.testing.assert_allclose(*curves, rtol=1e-9)
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000040")
    assert Checkpoints(Store(str(tmp_path / "run"))).newest().step == 35
