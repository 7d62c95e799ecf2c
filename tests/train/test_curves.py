"""30 steps with everything on, for any number of workers, any micro-batch, replicated and sharded: one curve.

Drop path, dropout, RandAugment, crops, flips and word masking are on; the last phase has a larger batch. In float64
curves and weights agree to rounding; in float32 a rounding difference may in time flip a discrete draw, so there the
tolerance is wide. Checkpoints go from one strategy and number of workers to another.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import SMALL, begin_at, job, train_on

from vlmo_ray.config import ClusterConfig, Config, Phase
from vlmo_ray.data.store import Store
from vlmo_ray.runs.metrics import read_metrics

LONG = dataclasses.replace(SMALL, phases=(Phase(20, 8), Phase(10, 12)), checkpoint_every=10, precision="float64")
full = pytest.mark.full
NAMES = ("step", "samples", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm", "temperature", "negative_similarity")


def config_of(strategy: str = "ddp", **changes) -> Config:
    cluster = ClusterConfig(max_workers=3, gpus_per_worker=0, strategy=strategy)
    return dataclasses.replace(LONG, cluster=cluster, **changes)


def curve(run: Path) -> np.ndarray:
    metrics, _ = read_metrics(Store(str(run)))
    return np.array([[m[name] for name in NAMES] for m in metrics])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def run_on(world: int, scenes: str, folder: Path, config: Config) -> Path:
    outcomes = train_on(world, job(scenes, folder, config))
    assert [outcome.step for outcome in outcomes] == [30] * world, outcomes
    return folder


def assert_same(run: Path, alone: Path, tolerance: float, weight_tolerance: float, after: int = 0) -> None:
    np.testing.assert_allclose(curve(run), curve(alone)[after:], rtol=tolerance, atol=tolerance)
    one, other = weights(run), weights(alone)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=weight_tolerance, atol=weight_tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory) -> dict[str, Path]:
    """Runs of one worker, by precision."""
    runs = {p: tmp_path_factory.mktemp(p) for p in ("float64", "float32")}
    for precision, folder in runs.items():
        run_on(1, scenes, folder, config_of(precision=precision))
    return runs


def test_the_noise_is_on():
    assert LONG.model.drop_path > 0 and LONG.data.randaugment_ops > 0 and LONG.data.flip
    assert LONG.task.mlm_probability > 0 and LONG.data.crop_area != (1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, strategy, micro_batch",
    [
        (1, "ddp", 2),
        (3, "ddp", 2),
        (2, "fsdp", 4),
        pytest.param(2, "ddp", 4, marks=full),
        pytest.param(3, "fsdp", 2, marks=full),
    ],
)
def test_workers_draw_one_curve(scenes, alone, tmp_path, world, strategy, micro_batch):
    """3 workers share 4 slices, later 6: unequal rows and unequal numbers of micro-batches."""
    run_on(world, scenes, tmp_path, config_of(strategy, micro_batch=micro_batch))
    assert_same(tmp_path, alone["float64"], 1e-9, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, strategy", [(2, "ddp"), pytest.param(3, "ddp", marks=full), pytest.param(3, "fsdp", marks=full)]
)
def test_workers_draw_one_curve_in_float32(scenes, alone, tmp_path, world, strategy):
    run_on(world, scenes, tmp_path, config_of(strategy, precision="float32", micro_batch=2))
    assert_same(tmp_path, alone["float32"], 1e-4, 1e-3)


@pytest.mark.slow
def test_checkpoints_go_from_one_strategy_to_the_other(scenes, alone, tmp_path):
    """One worker, then two sharded, then three replicated, then one again."""
    first = begin_at(tmp_path / "a", alone["float64"] / "checkpoint-00000010")
    run_on(2, scenes, first, config_of("fsdp"))
    assert_same(first, alone["float64"], 1e-9, 1e-9, after=10)
    last = begin_at(tmp_path / "b", first / "checkpoint-00000020")
    run_on(3, scenes, last, config_of("ddp", micro_batch=2))
    assert_same(last, alone["float64"], 1e-9, 1e-9, after=20)
