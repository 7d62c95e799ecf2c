"""A sweep of real runs: pruned, failed and killed half-way, and what its record says afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import SMALL

from vlmo_ray.data.store import Store, open_store
from vlmo_ray.launch.sweep import best_settings, read_sweep
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
STEPS = 96  # so many that a run is not over when it is decided to stop it
RATES = ["2e-3", "1e-3", "1e-6", "1e30", "4e-3"]
SETTINGS = [
    *(f"model.{name}={getattr(SMALL.model, name)}" for name in ("width", "depth", "num_heads", "vl_start")),
    *(f"model.{name}={getattr(SMALL.model, name)}" for name in ("image_size", "patch_size", "max_text_len")),
    "model.bias_text_len=12",
    f"phases=[[{STEPS},8]]",
    "slice_size=2",
    "micro_batch=4",
    "optim.warmup_steps=2",
    "checkpoint_every=32",
    "log_every=16",
    "cluster.gpus_per_worker=0",
    "cluster.min_workers=2",
    "cluster.max_workers=2",
]


class Command:
    """`vlmo tune` in a process of its own."""

    def __init__(self, data: str, storage: str, folder: Path):
        self.store = Store(f"{storage}/tiny-sweep")
        self.log = folder / "log"
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        self.words = [
            sys.executable, "-m", "vlmo_ray", "tune", "tiny", "--data", data, "--storage", storage, "--at-once", "2",
            "--space", f"optim.peak_lr={','.join(RATES)}", *settings,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen:
        environment = os.environ | {"RAY_worker_niceness": "0"}
        environment.pop("RAY_ADDRESS", None)
        with self.log.open("ab") as log:
            return subprocess.Popen(self.words, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def trials(self) -> list[dict]:
        return json.loads(self.store.read("sweep.json"))["trials"] if self.store.exists("sweep.json") else []

    def wait_for(self, process: subprocess.Popen, condition, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None and time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.3)


def progress(run: Store) -> int:
    return len(read_metrics(run)[0])


def test_a_sweep_is_killed_and_goes_on(scenes, bucket, tmp_path):
    for file in (file for file in Path(scenes).rglob("*") if file.is_file()):
        Store(f"{bucket}/data").upload(file, str(file.relative_to(scenes)))
    command = Command(f"{bucket}/data", f"{bucket}/runs", tmp_path)
    process = command.start()

    def half_way() -> bool:
        """Some trials have ended, and one that runs has a checkpoint."""
        trials = command.trials()
        running = [Store(f"{command.store.uri}/{trial['name']}") for trial in trials if trial["state"] == "running"]
        ended = len(trials) - len(running)
        return ended >= 2 and any(0 < progress(run) < STEPS and Checkpoints(run).newest() for run in running)

    command.wait_for(process, half_way)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    before = command.trials()
    ended = {trial["name"]: trial for trial in before if trial["state"] != "running"}
    over = [name for name, trial in ended.items() if trial["state"] != "pruned"]  # a pruned one may yet be saving
    measured = {name: Store(f"{command.store.uri}/{name}").sizes("metrics/") for name in over}

    process = command.start()
    assert process.wait(400) == 0, command.log.read_text()[-4000:]
    after = command.trials()
    assert [trial["params"]["optim.peak_lr"] for trial in after] == RATES
    assert [trial["name"] for trial in after[: len(before)]] == [trial["name"] for trial in before]
    assert {name: trial for trial in after if (name := trial["name"]) in ended} == ended
    for name, sizes in measured.items():  # trials that had ended are not run again
        assert Store(f"{command.store.uri}/{name}").sizes("metrics/") == sizes

    states = {trial["params"]["optim.peak_lr"]: trial["state"] for trial in after}
    assert states["1e30"] == "failed" and {*states.values()} == {"finished", "pruned", "failed"}, states
    (failed,) = (trial for trial in after if trial["state"] == "failed")
    assert "not finite" in failed["error"]
    stopped = 0
    for trial in after:
        run = Store(f"{command.store.uri}/{trial['name']}")
        metrics, _ = read_metrics(run)
        assert [row["step"] for row in metrics] == list(range(1, len(metrics) + 1))
        if trial["state"] == "pruned":  # asked to save: its newest checkpoint holds every step that it made
            assert trial["step"] <= len(metrics) <= STEPS and Checkpoints(run).newest().step == len(metrics)
            stopped += len(metrics) < STEPS
        if trial["state"] == "finished":
            assert len(metrics) == STEPS == trial["step"] and run.exists("model/model.json")
            assert trial["metric"] == pytest.approx(sum(row["loss"] for row in metrics[-16:]) / 16)
        if trial["state"] in ("pruned", "finished"):
            assert {row["workers"] for row in metrics} == {2}
        # the run of a trial that was just pruned may have died with the driver
        assert not run.exists("lease.json") or trial["name"] in set(ended).difference(over)

    assert stopped, "every run was over before it could be stopped"

    sweep = read_sweep(open_store(command.store.uri))
    best = min((t for t in sweep.trials if t.state == "finished"), key=lambda trial: trial.metric)
    assert sweep.best is best and command.store.read("sweep.png").startswith(b"\x89PNG")
    found = override(recipe("tiny"), best_settings(command.store.uri, recipe("tiny")))
    assert found.optim.peak_lr == float(best.params["optim.peak_lr"]) and found.total_steps == STEPS


@pytest.mark.full
def test_a_sweep_that_is_asked_to_end_saves_and_goes_on(scenes, tmp_path):
    command = Command(scenes, str(tmp_path / "runs"), tmp_path)
    process = command.start()

    def running() -> list[Store]:
        return [Store(f"{command.store.uri}/{t['name']}") for t in command.trials() if t["state"] == "running"]

    command.wait_for(process, lambda: any(0 < progress(run) < STEPS for run in running()))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 2 and "saved and ended on request" in command.log.read_text()
    saved = {}
    for run in running():
        assert not run.exists("lease.json")
        steps = progress(run)
        saved[run.uri] = steps
        assert steps == 0 or Checkpoints(run).newest().step == steps
    assert any(saved.values())
    process = command.start()
    assert process.wait(400) == 0, command.log.read_text()[-4000:]
    assert all(not read_metrics(Store(uri))[1] for uri in saved)  # no step was repeated
    after = command.trials()
    process = command.start()  # nothing is left to do
    assert process.wait(60) == 0 and command.trials() == after
