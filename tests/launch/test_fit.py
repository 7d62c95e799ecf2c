"""Pre-training and evaluation on Ray.

The oracle is the same run in one process without Ray.
"""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from small_run import SMALL, begin_at, job

import vlmo_ray
from vlmo_ray import cli
from vlmo_ray.config import Phase
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.evaluate import evaluate
from vlmo_ray.launch.fit import _write_report, fit
from vlmo_ray.launch.resources import Claims
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes import RECIPES
from vlmo_ray.runs import lease
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.follow import Following
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# long enough that what happens after the first checkpoint falls before the last one
CONFIG = dataclasses.replace(SMALL, phases=(Phase(40, 8), Phase(120, 12)), checkpoint_every=20, keep_checkpoints=2)


def test_other_settings_are_taken_on_request(ray_cluster, scenes, tmp_path, monkeypatch, capsys):
    """By the command itself; which tells what happens, as JSON if asked, and keeps it in the run."""
    train(job(scenes, tmp_path / "alone"))
    run = begin_at(tmp_path / "runs" / "small", tmp_path / "alone" / "checkpoint-00000008")
    monkeypatch.setitem(RECIPES, "small", lambda: SMALL)
    monkeypatch.chdir(tmp_path)  # workers have another working directory
    shutil.copytree(scenes, "data")
    command = ["vlmo", "train", "small", "--data", "data", "--storage", "runs", "--set", "init=alone"]
    command += ["--set", "seed=5", "--set", "cluster.max_workers=1"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "other settings: seed: 1 -> 5" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "--accept-changes", "--log-json"])
    cli.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    shown = [entry["event"] for entry in told]
    assert [event for event in shown if event != "worker"] == [
        "continued", "changed", "start", "workers", "resumed", "step", "checkpoint", "finished", "report",
        "done",
    ]  # fmt: skip
    assert "from here on with other settings: seed: 1 -> 5" in [entry["message"] for entry in told]
    assert f"the report: {run}/report.html" in [entry["message"] for entry in told]
    kept = Following(Store(str(run)), "events/").new()
    assert [entry["event"] for entry in kept if entry["who"] == "driver"] == [
        "failed", "continued", "changed", "start", "workers", "finished", "report"
    ]  # fmt: skip
    (failed,) = [entry for entry in kept if entry["event"] == "failed"]
    assert "other settings: seed: 1 -> 5" in failed["message"]
    assert [m["step"] for m in read_metrics(Store(str(run)))[0]] == [9, 10]
    assert Checkpoints(Store(str(run))).newest().config["seed"] == 5
    cli.main()
    assert "'small' is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_waits_for_nodes_ends_on_request(ray_cluster, scenes, tmp_path, number):
    waits = dataclasses.replace(SMALL, cluster=dataclasses.replace(SMALL.cluster, min_workers=1))
    others = Claims(1.0)  # another job's, which has all of the cluster
    others.want(2)
    assert others.wait(10)

    def ask() -> None:
        time.sleep(5)  # most of which it waits
        os.kill(os.getpid(), number)

    asker = threading.Thread(target=ask, daemon=True)
    try:
        asker.start()
        with pytest.raises(UserError, match="'small' ended on request while it had no workers"):
            fit(waits, scenes, str(tmp_path / "runs"))
        assert others.standing() == 2
    finally:
        asker.join()
        others.want(0)


@pytest.mark.full
def test_a_driver_that_lost_its_run_ends_and_leaves_it_alone(ray_cluster, scenes, tmp_path, monkeypatch):
    """Another driver has taken it over, in the belief that this one is gone."""
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    name = tmp_path / "runs" / "small" / "lease.json"

    def take_over() -> None:
        while not Checkpoints(Store(str(name.parent))).newest():
            time.sleep(0.1)
        taken = json.dumps(json.loads(name.read_text()) | {"token": "another", "host": "elsewhere"})
        Store(str(name.parent)).write(name.name, taken.encode())  # whole, as another driver would write it

    thief = threading.Thread(target=take_over, daemon=True)
    thief.start()
    with pytest.raises(UserError, match=r"runs/small was taken over by process .* on elsewhere"):
        fit(CONFIG, scenes, str(tmp_path / "runs"))
    thief.join()
    assert json.loads(name.read_text())["token"] == "another" and not (name.parent / "stop").exists()
    assert Checkpoints(Store(str(name.parent))).newest().step < 160


@pytest.mark.full
def test_a_sharded_run_equals_one_process(ray_cluster, bucket, scenes, tmp_path):
    cluster = dataclasses.replace(SMALL.cluster, strategy="fsdp", activation_checkpointing=True)
    assert train(job(scenes, tmp_path / "before")).step == 10
    trains = begin_at(tmp_path / "trains", tmp_path / "before" / "checkpoint-00000004")
    config = dataclasses.replace(SMALL, name="sharded", cluster=cluster, keep_checkpoints=2, init=str(trains))
    run = fit(config, scenes, f"{bucket}/runs")
    init = f"{trains}/checkpoint-00000004"  # of a run that still trains: the same for every worker
    assert Checkpoints(run).newest().config["init"] == init
    assert train(job(scenes, tmp_path / "alone", init=init)).step == 10
    found, wanted = (read_metrics(store)[0] for store in (run, Store(str(tmp_path / "alone"))))
    assert {m["workers"] for m in found} == {2}
    for name in ("samples", "loss", "itc", "itm", "mlm", "grad_norm"):
        values = [[m[name] for m in metrics] for metrics in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)
    model, alone = (vlmo_ray.load(store) for store in (run.uri, str(tmp_path / "alone")))
    assert model.config == SMALL.model
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-3)

    kept = {name.split("/")[0] for name in run.list("checkpoint-")}
    assert kept == {"checkpoint-00000008", "checkpoint-00000010"}
    for name in run.list("model/"):  # then `load` takes the newest checkpoint
        run.delete(name)
    again = vlmo_ray.load(run.uri).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.full
def test_a_broken_shard_ends_the_run_with_its_address(ray_cluster, scenes, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    shard = sorted(broken.rglob("*.parquet"), key=lambda path: (path.name == "manifest.parquet", path.name))[1]
    data = bytearray(shard.read_bytes())
    data[300] ^= 1
    shard.write_bytes(data)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"stopped at step \d+: .*{shard.name}"):
        fit(dataclasses.replace(CONFIG, name="broken"), str(broken), str(tmp_path / "runs"))
    assert time.monotonic() - began < 100  # not retried time and again
    with pytest.raises(UserError, match=shard.name):
        evaluate(VLMo(SMALL.model), str(broken))


def test_a_run_that_is_done_does_not_fail_for_its_report(tmp_path, capsys):
    _write_report(Store(str(tmp_path)))  # which holds no run
    said = capsys.readouterr().out
    assert said.startswith("there is no report (UserError: ") and f"vlmo report {tmp_path} makes it" in said
