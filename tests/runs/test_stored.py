"""Runs that the first version stored: today's program opens, audits and continues them, to the same figures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import job

import vlmo_ray
from vlmo_ray.data.store import Store
from vlmo_ray.overrides import from_dict, override
from vlmo_ray.runs.audit import audit
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

STORED = Path(__file__).parent.parent / "stored" / "v1"
FIGURES = ("samples", "lr", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm", "temperature")


@pytest.fixture
def data(tmp_path) -> str:
    return str(shutil.copytree(STORED / "data", tmp_path / "data"))


@pytest.fixture(params=["float32", "float64"])
def precision(request) -> str:
    return request.param


@pytest.fixture
def run(tmp_path, precision) -> str:
    shutil.unpack_archive(STORED / f"{precision}.tar.xz", tmp_path / "run")
    return str(tmp_path / "run")


def figures(run: str) -> dict[int, dict[str, float]]:
    metrics, _ = read_metrics(Store(run))
    return {row["step"]: {name: row[name] for name in FIGURES} for row in metrics}


def test_its_config_is_migrated(run):
    raw = json.loads((Path(run) / "checkpoint-00000008" / "train_state.json").read_text())["config"]
    assert "version" not in raw and "loss" in raw and "task" not in raw
    config = from_dict(raw)
    assert {name: getattr(config.task, name) for name in raw["loss"]} == raw["loss"]
    assert config.task.mlm_probability == raw["data"]["mlm_probability"] == 0.2
    assert config.data.retry_timeout_s == raw["data"]["patience_s"] == 300


def test_its_model_opens(run, precision):
    model = vlmo_ray.load(run)
    wanted = {"float32": (2, 30522), "float64": (4, 1100)}[precision]
    assert (model.config.width, model.config.vocab_size) == wanted
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_its_audit_is_clean(run, data):
    found = audit(run, data)
    assert found.clean and found.steps == 8 and [epoch.seen for epoch in found.epochs] == [60, 12]


def test_it_goes_on_to_the_figures_it_had(run, data, precision):
    tolerance = {"float32": 1e-5, "float64": 1e-9}[precision]
    wanted = figures(run)
    assert sorted(wanted) == list(range(1, 11))
    config = from_dict(Checkpoints(Store(run)).newest().config)
    shutil.rmtree(Path(run) / "metrics")  # so that all figures of steps 9 and 10 are new
    outcome = train(job(data, run, override(config, ["data.retry_timeout_s=9"])))
    assert outcome.step == 10 and not outcome.stopped, outcome
    found = figures(run)
    assert sorted(found) == [9, 10]
    for step, row in found.items():
        assert row == pytest.approx(wanted[step], rel=tolerance, abs=1e-12), step
    assert audit(run, data).clean
    weights = load_file(Path(run) / "model" / "model.safetensors")
    stored = load_file(STORED / f"{precision}_step_10.safetensors")
    assert len(stored) > 0.9 * len(weights)
    tolerance = max(tolerance, {"float32": 1e-4, "float64": 0}[precision])  # rounding of another processor, by Adam
    for name, value in stored.items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)
