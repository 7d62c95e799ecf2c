"""A small config that trains on `conftest.small_scenes` in seconds, here or in worker processes; runs compared."""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from worker_processes import in_processes

from vlmo_ray.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Encoder
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.schema import Record
from vlmo_ray.data.store import Store
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import Outcome, train

SMALL = Config(
    name="small",
    model=ModelConfig(
        width=24, depth=2, num_heads=2, vl_start=1, drop_path=0.1, image_size=16, patch_size=8, vocab_size=1100,
        max_text_len=12, bias_text_len=12, init_std=0.1,
    ),
    phases=(Phase(6, 8), Phase(4, 12)),
    slice_size=2,
    micro_batch=4,
    task=PretrainingConfig(),
    data=DataConfig(shuffle_steps=3),
    optim=OptimConfig(peak_lr=1e-3, warmup_steps=2),
    cluster=ClusterConfig(max_workers=2, gpus_per_worker=0, cpus_per_worker=0, data_cpus_per_worker=1),
    checkpoint_every=4,
    log_every=5,
)  # fmt: skip


def job(data: str, run: Path | str, config: Config = SMALL, **changes) -> RunSpec:
    config = dataclasses.replace(config, **changes)
    return RunSpec(config, data, str(run), load_manifest(data).fingerprint, in_process_data=True)


def begin_at(run: Path | str, checkpoint: Path) -> Path:
    """Puts another run's checkpoint into the folder `run`, so that it goes on from there."""
    shutil.copytree(checkpoint, Path(run) / checkpoint.name)
    return Path(run)


def _train(rank: int, world: int, job: RunSpec) -> Outcome:
    return train(job, rank=rank, world=world)


def train_on(world: int, job: RunSpec) -> list[Outcome]:
    """Outcomes by rank of `train` in `world` processes."""
    return in_processes(world, _train, job)


def same_run(run: Path | str, wanted: Path | str, figures: Sequence[str], first: int = 0) -> None:
    """The figures of every step, from the step `first` of the other run on, the final weights, and the evaluations."""
    found, expected = (Store(str(path)) for path in (run, wanted))
    curves = [[[row[name] for name in figures] for row in read_metrics(store)[0]] for store in (found, expected)]
    np.testing.assert_allclose(curves[0], curves[1][first:], rtol=1e-9)
    for name in ("model/model.safetensors", "model/task.safetensors"):
        assert found.exists(name) == expected.exists(name)
        if expected.exists(name):
            weights = [load_tensors(store.read(name)) for store in (found, expected)]
            torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12, msg=name)
    results, others = (dict(read_evaluations(store)) for store in (found, expected))
    assert max(results) == max(others) and all(result == others[step] for step, result in results.items())


def encoded(encoder: Encoder, rows: Iterable[dict]) -> Batch:
    """Stored rows as an evaluation reads them."""
    stored = list(rows)
    found = [encoder(Record(row["id"], row["image_id"], row), None) for row in stored]
    columns = {name: np.stack([row[name] for row in found]) for name in encoder.columns}
    places = {"valid": np.ones(len(stored), bool), "position": np.arange(len(stored))}
    ids = np.array([row["id"] for row in stored], dtype=object)
    return Batch.from_numpy(columns | places | {"id": ids, "problem": np.full(len(stored), "")})
