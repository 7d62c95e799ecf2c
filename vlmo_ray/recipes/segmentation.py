"""Semantic segmentation from a pre-trained image encoder: ADE20K with UperNet (paper section 4.4, Table 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, OptimConfig, Phase, TaskConfig
from vlmo_ray.errors import UserError
from vlmo_ray.fields import setting
from vlmo_ray.recipes.tiny import from_scratch, tiny


@dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
    """Cross-entropy over the classes of the data set's `mask` column, and how whole images are evaluated."""

    kind: ClassVar[str] = "segmentation"
    uneven_evaluation: ClassVar[bool] = True

    layers: tuple[int, ...] = (3, 5, 7, 11)  # whose states the head reads, from the finest map to the coarsest
    channels: int = setting(768, at_least=1, resume="fixed")  # of the head
    auxiliary_channels: int = setting(256, at_least=1, resume="fixed")
    auxiliary: float = setting(0.4, at_least=0)  # the weight of the auxiliary head's loss
    dropout: float = setting(0.1, at_least=0, below=1)  # of channels, before the classifiers
    layer_decay: float = setting(1.0, above=0, at_most=1)  # a layer's learning rate / that of the next layer
    # sizes of the image that an evaluation averages; the paper has one
    scales: tuple[float, ...] = setting((1.0,), resume="free")
    flipped: bool = setting(False, resume="free")  # also averages their mirror images

    def check(self, config: Config) -> None:
        model = config.model
        if len(self.layers) != 4 or not all(0 <= layer < model.depth for layer in self.layers):
            raise UserError(f"task.layers={self.layers} must name four of the layers 0 to {model.depth - 1}")
        if sorted(set(self.layers)) != list(self.layers):
            raise UserError(f"task.layers={self.layers} must rise, as UperNet reads coarser maps from later layers")
        if self.layers[-1] != model.depth - 1:
            raise UserError(f"task.layers={self.layers} must end with the last layer, which is {model.depth - 1}")
        if model.image_size < 2 * model.patch_size:
            raise UserError(
                f"model.image_size={model.image_size} is one patch of {model.patch_size} pixels, of which UperNet can "
                "make no coarser map; use two or more"
            )
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"task.scales={self.scales} must name sizes above 0, such as 1.0")


def segmentation_ade20k_base() -> Config:
    """VLMo-Base on ADE20K at 512 px: 160k steps of 16 images, as BEiT. Aim: mIoU 53.4 (paper Table 6).

    `vlmo train segmentation_ade20k_base --data s3://... --set init=s3://runs/classification_base_22k`. Not run at this
    size. From weights that have seen no labels BEiT takes a rate of 7e-4 and a layer decay of 0.65.
    """
    return Config(
        name="segmentation_ade20k_base",
        model=replace(MODEL_SIZES["base"], heads=(), image_size=512),
        task=SegmentationConfig(layer_decay=0.9),
        phases=(Phase(steps=160_000, global_batch=16),),
        slice_size=2,
        micro_batch=2,
        data=DataConfig(crop_area=(0.2, 1.0), randaugment_ops=1),
        optim=OptimConfig(peak_lr=3e-5, warmup_steps=1500, weight_decay=0.05, beta2=0.999),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=4),
        search=("optim.peak_lr=log:1e-5..3e-4",),
    )


def segmentation_ade20k_large() -> Config:
    """VLMo-Large on ADE20K at 512 px; like base with BEiT-Large's settings. Not run at this size."""
    base = segmentation_ade20k_base()
    return replace(
        base,
        name="segmentation_ade20k_large",
        model=replace(MODEL_SIZES["large"], heads=(), image_size=512, drop_path=0.2),
        task=SegmentationConfig(layers=(7, 11, 15, 23), channels=1024, layer_decay=0.95),
        optim=replace(base.optim, peak_lr=2e-5),
    )


def segmentation_tiny() -> Config:
    """The model of `demo` on a CPU: minutes on scenes. Start it from a run of `demo`, or of `vision_tiny`."""
    small = tiny()
    return replace(
        small,
        name="segmentation_tiny",
        model=from_scratch(replace(small.model, width=64, heads=())),
        task=SegmentationConfig(layers=(0, 1, 2, 3), channels=48, auxiliary_channels=24),
        phases=(Phase(steps=400, global_batch=32),),
        slice_size=16,
        micro_batch=32,
        data=DataConfig(crop_area=(0.5, 1.0), randaugment_ops=0),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=40),
        checkpoint_every=100,
        log_every=20,
        search=("optim.peak_lr=log:3e-4..3e-3",),
    )
