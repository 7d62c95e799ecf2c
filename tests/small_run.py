"""A small config that trains on `conftest.small_scenes` in seconds, here or in worker processes."""

import dataclasses
import shutil
from pathlib import Path

from worker_processes import in_processes

from vlmo_ray.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, Phase
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.recipes.pretraining import PretrainingConfig
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
