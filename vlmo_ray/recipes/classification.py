"""Image classification from a pre-trained image encoder (paper section 4.4, Table 6), as BEiT is fine-tuned.

The paper trains on ImageNet-22k first (`..._22k`), and on ImageNet-1k from there (`..._from_22k`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.tiny import tiny

_IMAGES_1K, _IMAGES_22K = 1_281_167, 14_197_122


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Cross-entropy over the classes of the data set's `label` column."""

    kind: ClassVar[str] = "classification"

    label_smoothing: float = setting(0.1, at_least=0, below=1)
    head_lr_scale: float = setting(1.0, above=0)  # the head's learning rate / the schedule's
    layer_decay: float = setting(1.0, above=0, at_most=1)  # a layer's learning rate / that of the next layer
    # "norm_mean": the patches are averaged after the model's last norm. "mean_norm": before it, and a new norm follows
    # (BEiT), with a head that starts a thousand times smaller.
    head: Literal["norm_mean", "mean_norm"] = "norm_mean"
    mixup: float = setting(0.0, at_least=0)  # of the beta distribution of the shares; 0: images are not mixed so
    cutmix: float = setting(0.0, at_least=0)  # the same, of images that get a box of another
    # "squash": the whole image becomes a square. "center": the centre is cut out, as ImageNet models are evaluated.
    eval_crop: Literal["squash", "center"] = "squash"

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def check(self, config: Config) -> None:
        if self.mixes and config.slice_size < 2:
            raise UserError(
                f"slice_size={config.slice_size} has no other row to mix with, as task.mixup={self.mixup} and "
                f"task.cutmix={self.cutmix} ask; raise slice_size"
            )


def classification_base() -> Config:
    """The image encoder of VLMo-Base on ImageNet-1k at 224 px: 100 epochs. BEiT-Base reaches 83.7 top-1 so.

    `vlmo train classification_base --data s3://... --set init=s3://runs/pretrain_base`. Not run at this size.
    """
    return _on_1k("classification_base", "base", 1024, 100, 20, peak_lr=4e-3, layer_decay=0.65, drop_path=0.1)


def classification_base_22k() -> Config:
    """The image encoder of VLMo-Base on ImageNet-22k at 224 px: 90 epochs, before `classification_base_from_22k`.

    `vlmo train classification_base_22k --data s3://... --set init=s3://runs/pretrain_base`. Not run at this size.
    """
    return _on_22k("classification_base_22k", "base", 4096, peak_lr=3e-3, layer_decay=0.65, clip_norm=3.0)


def classification_base_from_22k() -> Config:
    """VLMo-Base after ImageNet-22k on ImageNet-1k at 224 px: 30 epochs; aim: 85.5 top-1 (paper Table 6). BEiT-Base
    reaches 85.2.

    `vlmo train classification_base_from_22k --data s3://... --set init=s3://runs/classification_base_22k`. Not run at
    this size.
    """
    return _after_22k(classification_base(), "classification_base_from_22k", layer_decay=0.85, drop_path=0.1)


def classification_large() -> Config:
    """The image encoder of VLMo-Large on ImageNet-1k at 224 px: 50 epochs. BEiT-Large reaches 86.0 top-1 so.

    `vlmo train classification_large --data s3://... --set init=s3://runs/pretrain_large`. Not run at this size.
    """
    return _on_1k("classification_large", "large", 1024, 50, 5, peak_lr=1e-3, layer_decay=0.75, drop_path=0.2)


def classification_large_22k() -> Config:
    """The image encoder of VLMo-Large on ImageNet-22k at 224 px: 90 epochs, before `classification_large_from_22k`.

    `vlmo train classification_large_22k --data s3://... --set init=s3://runs/pretrain_large`. Not run at this size.
    """
    return _on_22k("classification_large_22k", "large", 2048, peak_lr=2e-3, layer_decay=0.75, clip_norm=1.0)


def classification_large_from_22k() -> Config:
    """VLMo-Large after ImageNet-22k on ImageNet-1k at 224 px: 30 epochs. BEiT-Large reaches 87.4 top-1 so.

    `vlmo train classification_large_from_22k --data s3://... --set init=s3://runs/classification_large_22k`. Not run at
    this size.
    """
    return _after_22k(classification_large(), "classification_large_from_22k", layer_decay=0.9, drop_path=0.4)


def _on_1k(
    name: str,
    size: str,
    batch: int,
    epochs: int,
    warmup_epochs: int,
    *,
    peak_lr: float,
    layer_decay: float,
    drop_path: float,
) -> Config:
    """Straight from pre-training to ImageNet-1k, with mixed images."""
    steps, large = _IMAGES_1K // batch, size == "large"
    return Config(
        name=name,
        model=replace(MODEL_SIZES[size], heads=(), drop_path=drop_path, layer_scale=1e-5 if large else 0.1),
        task=ClassificationConfig(layer_decay=layer_decay, head="mean_norm", mixup=0.8, cutmix=1.0, eval_crop="center"),
        phases=(Phase(steps=epochs * steps, global_batch=batch),),
        slice_size=16,
        micro_batch=64 if large else 128,
        data=DataConfig(crop_area=(0.08, 1.0), augment="timm", randaugment_magnitude=9, erase=0.25),
        optim=OptimConfig(
            peak_lr=peak_lr, warmup_steps=warmup_epochs * steps, weight_decay=0.05, beta2=0.999, schedule="cosine"
        ),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=10),
    )


def _on_22k(name: str, size: str, batch: int, *, peak_lr: float, layer_decay: float, clip_norm: float) -> Config:
    """90 epochs of ImageNet-22k, whose images are not mixed."""
    steps = _IMAGES_22K // batch
    config = _on_1k(name, size, batch, 90, 5, peak_lr=peak_lr, layer_decay=layer_decay, drop_path=0.2)
    return replace(
        config,
        task=replace(config.task, mixup=0.0, cutmix=0.0),
        phases=(Phase(steps=90 * steps, global_batch=batch),),
        optim=replace(config.optim, warmup_steps=5 * steps, clip_norm=clip_norm),
    )


def _after_22k(config: Config, name: str, *, layer_decay: float, drop_path: float) -> Config:
    """30 epochs of ImageNet-1k after ImageNet-22k, at a small learning rate; images are not mixed."""
    steps = _IMAGES_1K // 512
    return replace(
        config,
        name=name,
        model=replace(config.model, drop_path=drop_path),
        task=replace(config.task, layer_decay=layer_decay, mixup=0.0, cutmix=0.0),
        phases=(Phase(steps=30 * steps, global_batch=512),),
        optim=replace(config.optim, peak_lr=2e-5, warmup_steps=5 * steps, weight_decay=1e-8),
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
