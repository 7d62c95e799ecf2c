"""Stage 1 of pre-training: attention and vision experts on images alone, by masked image modelling (section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.tiny import from_scratch, tiny


@dataclass(frozen=True)
class VisionConfig(TaskConfig):
    """What is masked, and what is predicted there."""

    kind: ClassVar[str] = "vision"

    mask: Literal["random", "block"] = "random"  # units of 2 x 2 patches, or BEiT's rectangles
    mask_share: float = setting(0.6, above=0, below=1)  # of the patches; BEiT: 75 / 196
    # "pixels": those of a patch, normalised by its mean and deviation. "features": what the average of the weights
    # makes of the whole image there. "MODULE:NAME": what the callable NAME of the
    # Python module MODULE returns, a `tasks.vision.Tokenizer`, gives for a patch.
    target: str = "pixels"

    def check(self, config: Config) -> None:
        if self.target not in ("pixels", "features") and not all(self.target.partition(":")):
            raise UserError(
                f"task.target={self.target!r} is none of 'pixels', 'features' and 'module:name' of a tokenizer"
            )
        if self.target == "features" and not config.optim.average_decay:
            raise UserError("task.target='features' needs an average of the weights: set optim.average_decay (0.999)")


def vision_base() -> Config:
    """The image encoder of VLMo-Base: 500k steps of 2,048 images at 224 px, as BEiT (its section 2.5) with pixels as
    targets. Not run at this size; the released models begin from BEiT itself (`vlmo import`)."""
    return Config(
        name="vision_base",
        model=replace(MODEL_SIZES["base"], heads=()),
        phases=(Phase(steps=500_000, global_batch=2048),),
        slice_size=16,
        micro_batch=128,
        task=VisionConfig(),
        data=DataConfig(crop_area=(0.2, 1.0), randaugment_ops=0),
        optim=OptimConfig(peak_lr=1.5e-3, warmup_steps=6250, weight_decay=0.05, beta2=0.999, schedule="cosine"),
        cluster=ClusterConfig(min_workers=2, max_workers=16, cpus_per_worker=2, data_cpus_per_worker=10),
    )


def vision_base_plus() -> Config:
    """Like base, for the narrow 24-layer model."""
    model = replace(MODEL_SIZES["base_plus"], heads=())
    return replace(vision_base(), name="vision_base_plus", model=model, micro_batch=64)


def vision_large() -> Config:
    """Like base, for the large model."""
    return replace(vision_base(), name="vision_large", model=replace(MODEL_SIZES["large"], heads=()), micro_batch=64)


def vision_tiny() -> Config:
    """A tiny image encoder on a CPU; a minute on scenes."""
    small = tiny()
    return replace(
        small,
        name="vision_tiny",
        model=from_scratch(replace(small.model, width=64, heads=())),
        task=VisionConfig(),
        phases=(Phase(steps=200, global_batch=64),),
        micro_batch=64,
        data=DataConfig(crop_area=(0.5, 1.0), randaugment_ops=0),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=20, schedule="cosine"),
        checkpoint_every=50,
    )
