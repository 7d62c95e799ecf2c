"""Vision-language pre-training as in the paper (sections 4.1 and 4.2).

The contrast's gradient at the features is scaled as in the published runs, whose gather had none: by 1 / 64 for
base and 1 / 128 for large, the numbers of their GPUs. `--set loss.feature_grad_scale=1` makes it exact.
"""

from __future__ import annotations

from dataclasses import replace

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, LossConfig, OptimConfig, Phase


def pretrain_base() -> Config:
    """VLMo-Base on 4M images: 200k steps of 1,024 pairs at 224 px, peak rate 2e-4 (section 4.1).

    The paper's run took two days on 64 V100; `vlmo pretrain pretrain_base --data s3://...`.
    """
    return Config(
        name="pretrain_base",
        model=MODEL_SIZES["base"],
        phases=(Phase(steps=200_000, global_batch=1024),),
        slice_size=16,
        micro_batch=64,
        loss=LossConfig(feature_grad_scale=1 / 64),
        optim=OptimConfig(peak_lr=2e-4, warmup_steps=2500),
        cluster=ClusterConfig(min_workers=4, max_workers=16, cpus_per_worker=2, data_cpus_per_worker=8),
    )


def pretrain_base_plus() -> Config:
    """The narrow 24-layer model of the official release: as base, peak rate 1e-4."""
    base = pretrain_base()
    return replace(
        base,
        name="pretrain_base_plus",
        model=MODEL_SIZES["base_plus"],
        optim=replace(base.optim, peak_lr=1e-4),
    )


def pretrain_large() -> Config:
    """VLMo-Large on 4M images: as base, peak rate 5e-5 (section 4.1). Three days on 128 V100 in the paper."""
    base = pretrain_base()
    return replace(
        base,
        name="pretrain_large",
        model=MODEL_SIZES["large"],
        loss=LossConfig(feature_grad_scale=1 / 128),
        optim=replace(base.optim, peak_lr=5e-5),
    )


def pretrain_1b() -> Config:
    """VLMo-Large on one billion noisy pairs: 200k steps of 16k, then 100k of 32k (section 4.2).

    Both phases belong to one run with one optimizer. The paper does not say how the learning rate goes across
    them, nor on how many GPUs it ran: here it is one linear decay over the 300k steps, and large's balance.
    """
    large = pretrain_large()
    return replace(
        large,
        name="pretrain_1b",
        phases=(Phase(steps=200_000, global_batch=16_384), Phase(steps=100_000, global_batch=32_768)),
        slice_size=64,
        micro_batch=128,
        checkpoint_every=250,
        cluster=ClusterConfig(
            min_workers=8, max_workers=128, cpus_per_worker=2, data_cpus_per_worker=10, max_failures=1000
        ),
    )
