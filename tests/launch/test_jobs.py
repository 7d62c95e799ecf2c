"""`ray job submit -- python jobs/pretrain_1b.py --tiny` on a local head with token authentication, and again.

The first submission is stopped in the middle; the second resumes it; a third finds it finished. Also the thin
things around it: jobs are short, and a mistake ends with a sentence.
"""

import contextlib
import json
import os
import re
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_run import job

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def head(tmp_path):
    """A Ray head of its own with a dashboard and a token; yields (its address, the environment to reach it)."""
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing is left to drain when the test ends the head
        "PYTHONUNBUFFERED": "1",
    }
    dashboard = free_port()
    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports = [f"--dashboard-port={dashboard}", *(f"--{name}={free_port()}" for name in names)]
    sizes = ["--num-cpus=2", "--object-store-memory=300000000"]
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", *ports, *sizes]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            os.kill(process.pid, signal.SIGTERM)  # --block ends the whole head with it
            try:
                process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def submit(address, environment, *arguments, flags=()) -> subprocess.CompletedProcess:
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", *flags, "--"]
    command += ["python", "jobs/pretrain_1b.py", *arguments]
    deadline = time.monotonic() + 90
    while True:
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        run.stdout += run.stderr
        starting = any(words in run.stdout for words in ("Failed to connect", "No available agent"))
        if not starting or time.monotonic() > deadline:
            return run
        time.sleep(1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_submit_and_submit_again(bucket, tmp_path):
    data, storage = f"{bucket}/scenes", f"{bucket}/runs"
    write_dataset(data, records(1, 200, image_size=32), rows_per_group=32)
    arguments = ("--tiny", "--data", data, "--storage", storage, "--name", "job", "--set", "phases=[[104,16],[12,32]]")
    total = 116  # so many that the first job is stopped before its end
    with head(tmp_path) as (address, environment):
        without = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        for wrong in (environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, without | {"HOME": str(tmp_path)}):
            refused = submit(address, wrong, *arguments)
            assert refused.returncode and "succeeded" not in refused.stdout
        early = submit(address, environment, *arguments, flags=("--no-wait", "--submission-id", "early"))
        assert early.returncode == 0, early.stdout[-4000:]
        run, deadline = Store(f"{storage}/job"), time.monotonic() + 150
        while Checkpoints(run).newest() is None:
            assert time.monotonic() < deadline, "no checkpoint was made"
            time.sleep(0.1)
        stop = [BIN / "ray", "job", "stop", "--address", address, "early"]
        subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=60)
        reached = Checkpoints(run).newest().step  # its workers may yet save once more
        assert reached < total, "stopped too late to leave anything to resume"

        began = time.monotonic()
        first = submit(address, environment, *arguments)
        assert first.returncode == 0 and "succeeded" in first.stdout, first.stdout[-4000:]
        assert time.monotonic() - began < 150, "waited for what the stopped run had reserved"
        found = re.search(rf"run 'job' continues from step (\d+) of {total}", first.stdout)
        assert found and reached <= int(found[1]) < total, first.stdout[-4000:]
        metrics, _ = read_metrics(Store(f"{storage}/job"))
        assert [m["step"] for m in metrics] == list(range(1, total + 1))
        assert {m["samples"] for m in metrics} >= {104 * 16, 104 * 16 + 12 * 32}  # both phases
    config = override(recipe("pretrain_1b_tiny"), ["phases=[[104,16],[12,32]]"])
    assert train(job(data, tmp_path / "undisturbed", config)).step == total
    undisturbed, _ = read_metrics(Store(str(tmp_path / "undisturbed")))
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in undisturbed], rtol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_a_finished_run_and_a_mistake(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    data, storage = f"{bucket}/scenes", f"{bucket}/runs"
    write_dataset(data, records(1, 100, image_size=32), rows_per_group=32)
    arguments = ("--tiny", "--data", data, "--storage", storage, "--name", "job", "--set", "phases=[[3,16]]")
    arguments += ("--set", "optim.warmup_steps=1", "--log-json", "--tracker", "mlflow")
    with head(tmp_path) as (address, environment):
        first = submit(address, environment, *arguments)
        assert first.returncode == 0 and "succeeded" in first.stdout, first.stdout[-4000:]
        told = [json.loads(line) for line in first.stdout.splitlines() if line.startswith("{")]
        events = [entry["event"] for entry in told]
        wanted = ["start", "workers", "step", "checkpoint", "finished", "done"]
        assert [event for event in wanted if event in events] == wanted, events
        assert "step 3/3  loss" not in first.stdout  # no sentences beside the objects
        metrics = read_metrics(Store(f"{storage}/job"))
        tracked = list((tmp_path / "mlruns").rglob("metrics/loss"))
        assert [len(path.read_text().splitlines()) for path in tracked] == [3]

        again = submit(address, environment, *arguments)
        assert again.returncode == 0, again.stdout[-4000:]
        assert "run 'job' is finished already" in again.stdout and "worker 0 of" not in again.stdout
        assert read_metrics(Store(f"{storage}/job")) == metrics

        wrong = submit(address, environment, "--tiny", "--data", f"{bucket}/nothing", "--storage", storage)
        assert wrong.returncode == 1 and "vlmo: " in wrong.stdout and "Traceback" not in wrong.stdout


JOBS = {
    "pretrain_1b": ("train pretrain_1b", ""),
    "pretrain_4m": ("train pretrain_large", "large"),
    "finetune": ("train vqa_base", "vqa_base"),
    "tune_vqa": ("tune vqa_base", ""),
    "tune_nlvr2": ("tune nlvr2_base_224", ""),
    "tune_retrieval": ("tune retrieval_coco_base", ""),
    "evaluate": ("evaluate RUN", "RUN"),
    "prepare": ("prepare table IN OUT", "table IN OUT"),
    "embed": ("embed RUN", "RUN"),
}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_jobs_are_thin(path, monkeypatch, capsys):
    assert len(path.read_text().splitlines()) < 40
    if path.stem in ("pretrain_stages", "ablate"):  # which test_stage_chain.py and test_ablate.py run
        monkeypatch.setattr("sys.argv", [str(path), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(path), run_name="__main__")
        assert "--storage" in capsys.readouterr().out
        return
    command, given = JOBS[path.stem]
    called = []
    monkeypatch.setattr("vlmo_ray.cli.main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr("sys.argv", [str(path), *given.split(), "--data", "URI"])
    runpy.run_path(str(path), run_name="__main__")
    assert called == [[*command.split(), "--data", "URI"]]


def test_the_tiny_run_is_the_same_job(monkeypatch):
    called = []
    monkeypatch.setattr("vlmo_ray.cli.main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr("sys.argv", ["pretrain_1b.py", "--data", "URI", "--tiny"])
    runpy.run_path(str(ROOT / "jobs" / "pretrain_1b.py"), run_name="__main__")
    assert called == [["train", "pretrain_1b_tiny", "--data", "URI"]]


def test_a_size_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain_4m.py", "huge"])
    with pytest.raises(SystemExit, match="base, base_plus or large"):
        runpy.run_path(str(ROOT / "jobs" / "pretrain_4m.py"), run_name="__main__")


def test_what_is_uploaded_with_a_job_is_small(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "package.zip"
    create_package(str(ROOT), target, True)
    with zipfile.ZipFile(target) as package:
        names = package.namelist()
    assert target.stat().st_size < 1_500_000 and any(name.endswith("jobs/pretrain_1b.py") for name in names)
    assert not any("/tests/" in f"/{name}" for name in names)
