"""Image classification from a pre-trained image encoder (paper section 4.4, Table 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.recipes.tiny import tiny


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Cross-entropy over the classes of the data set's `label` column."""

    kind: ClassVar[str] = "classification"

    label_smoothing: float = setting(0.1, at_least=0, below=1)
    head_lr_scale: float = setting(1.0, above=0)  # the head's learning rate / that of the last layer
    layer_decay: float = setting(1.0, above=0, at_most=1)  # a layer's learning rate / that of the next layer


def classification_base() -> Config:
    """The image encoder of VLMo-Base on class folders at 224 px, as fine-tuned for BEiT: layer decay 0.65, cosine.

    `vlmo train classification_base --data s3://... --set init=s3://runs/pretrain_base`. Not run at this size.
    """
    return Config(
        name="classification_base",
        model=replace(MODEL_SIZES["base"], heads=()),
        task=ClassificationConfig(layer_decay=0.65),
        phases=(Phase(steps=125_000, global_batch=1024),),
        slice_size=16,
        micro_batch=128,
        data=DataConfig(crop_area=(0.08, 1.0)),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=25_000, weight_decay=0.05, beta2=0.999, schedule="cosine"),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=10),
    )


def classification_tiny() -> Config:
    """A tiny image encoder from scratch on a CPU; takes a minute on labelled scenes."""
    small = tiny()
    return replace(
        small,
        name="classification_tiny",
        model=replace(small.model, width=64, heads=(), init_std=0.06),  # with 0.125: 87.5 % on scenes, not 92
        task=ClassificationConfig(label_smoothing=0.0),
        phases=(Phase(steps=200, global_batch=64),),
        slice_size=16,
        micro_batch=64,
        data=DataConfig(crop_area=(0.8, 1.0), randaugment_ops=0),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=20, schedule="cosine"),
        checkpoint_every=100,
        log_every=20,
    )
