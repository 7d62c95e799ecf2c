"""The chain of stages: what each begins from, and the job itself, interrupted once in each stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from small_run import train_on

from vlmo_ray import stages
from vlmo_ray.data.mix import load_data
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.errors import UserError
from vlmo_ray.launch.stop import Stopped
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.build import RunSpec

JOB = Path(__file__).parents[1] / "jobs" / "pretrain_stages.py"
NAMES = ["vision_tiny", "language_tiny", "demo"]
STEPS = 100  # so many that a signal at the tenth comes in time, also on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Scenes as images, their captions as texts, and both as pairs."""
    folder, pairs = tmp_path_factory.mktemp("stages"), list(records(5, 400, image_size=32))
    rows = {
        "pairs": pairs,
        "images": [{name: row[name] for name in ("id", "image_id", "image")} for row in pairs],
        "texts": [{"id": row["id"], "image_id": "", "text": row["text"]} for row in pairs],
    }
    schemas = {"images": Schema((Field("image", "image"),)), "texts": Schema((Field("text", "text"),))}
    for name, some in rows.items():
        more = {"schema": schemas[name]} if name in schemas else {}
        write_dataset(str(folder / name), some, rows_per_group=32, **more)
    return {name: str(folder / name) for name in rows}


@pytest.mark.parametrize("size", ["base", "base_plus", "large", "tiny"])
def test_each_stage_begins_from_the_one_before(data, monkeypatch, size):
    begun = []
    monkeypatch.setattr(stages, "fit", lambda config, uri, storage, stop: begun.append((config, uri)) or storage)
    options = {"init": "beit", "start_text_experts": "image", "start_vl_experts": "image"}
    stages.pretrain_stages(size, **data, storage="s3://runs/", **options)
    last = "demo" if size == "tiny" else f"pretrain_{size}"
    assert [(c.name, Path(uri).name, c.init, c.start_text_experts, c.start_vl_experts) for c, uri in begun] == [
        (f"vision_{size}", "images", "beit", "", ""),
        (f"language_{size}", "texts", f"s3://runs/vision_{size}", "image", ""),
        (last, "pairs", f"s3://runs/language_{size}", "", "image"),
    ]
    same = ("width", "depth", "num_heads", "vl_start", "position", "bias_text_len", "image_size", "layer_scale")
    assert len({tuple(getattr(config.model, name) for name in same) for config, _ in begun}) == 1
    begun.clear()
    stages.pretrain_stages(size, **(data | {"images": "", "texts": ""}), storage="s3://runs", **options)
    ((config, _),) = begun
    assert (config.init, config.start_text_experts, config.start_vl_experts) == ("beit", "image", "image")


def test_mistakes_are_told_before_the_first_stage(data, monkeypatch):
    monkeypatch.setattr(stages, "fit", lambda *_, **__: pytest.fail("a stage began"))
    with pytest.raises(UserError, match="does not exist"):
        stages.pretrain_stages("tiny", **(data | {"pairs": "/no/such/pairs"}), storage="/tmp/never")
    with pytest.raises(UserError, match="no stage has data"):
        stages.pretrain_stages("tiny", "", "", "", "/tmp/never")


def test_a_signal_at_the_very_end_of_a_stage_ends_the_chain(data, monkeypatch):
    begun = []
    monkeypatch.setattr(stages, "fit", lambda config, uri, storage, stop: begun.append(config.name) or stop.set())
    with pytest.raises(Stopped, match="before the stage language_tiny"):
        stages.pretrain_stages("tiny", **data, storage="s3://runs")
    assert begun == ["vision_tiny"]


def chain(data: dict[str, str], storage: Path) -> list[str]:
    given = [word for name, uri in data.items() for word in (f"--{name}", uri)]
    more = ["--storage", str(storage), "--start-vl-experts", "image", "--steps", str(STEPS)]
    return [sys.executable, str(JOB), "tiny", *given, *more]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_the_job_interrupted_once_in_each_stage_equals_the_uninterrupted_one(data, tmp_path, monkeypatch):
    """The oracle is the chain without Ray, on as many workers."""

    def without_ray(config, uri, storage, stop):
        fingerprint = load_data(uri).fingerprint
        spec = RunSpec(config, uri, f"{storage}/{config.name}", fingerprint, in_process_data=True)
        assert [outcome.step for outcome in train_on(2, spec)] == [STEPS] * 2
        return Store(spec.run)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", without_ray)
        stages.pretrain_stages("tiny", **data, storage=str(tmp_path / "whole"), start_vl_experts="image", steps=STEPS)
    environment = os.environ | {"RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    for name in NAMES:
        run, log = Store(str(tmp_path / "cut" / name)), tmp_path / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                chain(data, tmp_path / "cut"), env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 200
        while f"step 10/{STEPS}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 2, log.read_text()[-3000:]
        assert 0 < Checkpoints(run).newest().step < STEPS
    done = subprocess.run(chain(data, tmp_path / "cut"), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    for name in NAMES:
        cut, whole = (Store(str(tmp_path / folder / name)) for folder in ("cut", "whole"))
        (found, repeated), (wanted, _) = read_metrics(cut), read_metrics(whole)
        assert not repeated and [row["step"] for row in found] == list(range(1, STEPS + 1))
        np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in wanted], rtol=1e-4, err_msg=name)
        states = [load_tensors(run.read("model/model.safetensors")) for run in (cut, whole)]
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
