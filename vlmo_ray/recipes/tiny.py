"""Small runs: for a laptop's CPU, for the demo, and for one GPU."""

from __future__ import annotations

from dataclasses import replace

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, Phase
from vlmo_ray.recipes.pretraining import PretrainingConfig, pretrain_1b


def from_scratch(model: ModelConfig) -> ModelConfig:
    """The model with a start that fits its width, without LayerScale.

    The published sizes start from BEiT, with 0.02 and LayerScale. A narrow model that starts so, or at 0.06, learns
    matching several times later than at 1 / sqrt(width): the text CLS hardly depends on image and text jointly.
    """
    return replace(model, init_std=model.width**-0.5, layer_scale=None)


def tiny() -> Config:
    """A few steps of a tiny model that run every component: `vlmo train tiny --data FOLDER`."""
    return Config(
        name="tiny",
        model=MODEL_SIZES["tiny"],
        phases=(Phase(steps=60, global_batch=32),),
        slice_size=8,
        micro_batch=16,
        task=PretrainingConfig(),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=10),
        cluster=ClusterConfig(max_workers=2, gpus_per_worker=0, cpus_per_worker=0, data_cpus_per_worker=1),
        checkpoint_every=20,
        log_every=10,
    )


def demo() -> Config:
    """What `make demo` trains: scenes of coloured shapes on two CPU workers."""
    return replace(
        tiny(),
        name="demo",
        model=from_scratch(replace(MODEL_SIZES["tiny"], width=64)),
        phases=(Phase(steps=300, global_batch=96),),
        slice_size=24,
        micro_batch=48,
        data=DataConfig(shuffle_steps=16),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=30),
        checkpoint_every=50,
        log_every=10,
    )


def pretrain_1b_tiny() -> Config:
    """The two phases of `pretrain_1b` at small scale: the same code path on a laptop, with the exact contrast."""
    return replace(
        pretrain_1b(),
        name="pretrain_1b_tiny",
        model=MODEL_SIZES["tiny"],
        phases=(Phase(steps=24, global_batch=16), Phase(steps=12, global_batch=32)),
        slice_size=8,
        micro_batch=8,
        task=PretrainingConfig(),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=4),
        cluster=ClusterConfig(max_workers=2, gpus_per_worker=0, cpus_per_worker=0, data_cpus_per_worker=1),
        checkpoint_every=12,
        log_every=6,
    )


def small_photos() -> Config:
    """Photographs with captions on a CPU: 90k pairs at 64 px; half an hour on 2 busy cores."""
    return replace(
        tiny(),
        name="small_photos",
        model=from_scratch(replace(MODEL_SIZES["tiny"], width=128, image_size=64, patch_size=16)),
        phases=(Phase(steps=700, global_batch=128),),
        slice_size=32,
        micro_batch=64,
        data=DataConfig(shuffle_steps=16, randaugment_ops=0),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=70),
        checkpoint_every=100,
        log_every=10,
    )


def medium_photos() -> Config:
    """Photographs with captions on one GPU: a 12-layer narrow model at 128 px."""
    return replace(
        small_photos(),
        name="medium_photos",
        model=from_scratch(
            replace(MODEL_SIZES["base"], width=384, num_heads=6, image_size=128, max_text_len=32, bias_text_len=32)
        ),
        phases=(Phase(steps=4000, global_batch=1024),),
        slice_size=64,
        micro_batch=512,
        data=DataConfig(),
        optim=OptimConfig(peak_lr=5e-4, warmup_steps=400),
        cluster=ClusterConfig(cpus_per_worker=2, data_cpus_per_worker=12),
        checkpoint_every=500,
        log_every=50,
    )
