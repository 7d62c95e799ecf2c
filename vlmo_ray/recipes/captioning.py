"""Captioning: the fusion encoder learns to write what an image shows (the outlook of the paper's section 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, OptimConfig, Phase, TaskConfig
from vlmo_ray.errors import UserError
from vlmo_ray.fields import setting
from vlmo_ray.recipes.tiny import tiny


@dataclass(frozen=True)
class CaptioningConfig(TaskConfig):
    """Masked tokens of captions that see only what stands before them, and how captions are searched for."""

    kind: ClassVar[str] = "captioning"
    uneven_evaluation: ClassVar[bool] = True

    mask_share: float = setting(0.7, above=0, below=1)  # of the tokens of a caption
    label_smoothing: float = setting(0.1, at_least=0, below=1)
    beams: int = setting(3, at_least=1, resume="free")
    # the score of a caption: log probability / length to this power
    length_exponent: float = setting(0.6, at_least=0, resume="free")

    def check(self, config: Config) -> None:
        if "mlm" not in config.model.heads:
            raise UserError("model.heads lacks mlm, with which captions are written; add it")
        if config.model.attention == "separate":
            raise UserError("captions cannot be written with model.attention='separate'; use 'shared'")


def captioning_coco_base() -> Config:
    """VLMo-Base on COCO at 480 px with the settings of BEiT-3: 10 epochs of 566,435 captions.

    `vlmo train captioning_coco_base --data s3://... --set init=s3://runs/pretrain_base`. Aim: that of models of 4M
    pairs, CIDEr of 1.10 to 1.25 on Karpathy's test split (papers print 100 times that). Not run at this size.
    """
    return Config(
        name="captioning_coco_base",
        model=replace(MODEL_SIZES["base"], heads=("mlm",), image_size=480, max_text_len=32),
        task=CaptioningConfig(),
        phases=(Phase(steps=22_120, global_batch=256),),
        slice_size=16,
        micro_batch=32,
        optim=OptimConfig(peak_lr=4e-5, warmup_steps=2212, weight_decay=0.05, schedule="cosine"),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=8),
        search=("optim.peak_lr=log:1e-5..1e-4",),
    )


def captioning_coco_large() -> Config:
    """VLMo-Large on COCO; like base, with a peak rate of 8e-6. Not run at this size."""
    base = captioning_coco_base()
    model = replace(MODEL_SIZES["large"], heads=("mlm",), image_size=480, max_text_len=32)
    return replace(
        base, name="captioning_coco_large", model=model, micro_batch=16, optim=replace(base.optim, peak_lr=8e-6)
    )


def captioning_tiny() -> Config:
    """The model of `demo` on a CPU: minutes on scenes. Start it from a run of `demo`."""
    small = tiny()
    return replace(
        small,
        name="captioning_tiny",
        model=replace(small.model, width=64, heads=("mlm",)),
        task=CaptioningConfig(),
        phases=(Phase(steps=400, global_batch=96),),
        slice_size=16,
        micro_batch=96,
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=40),
        checkpoint_every=100,
        log_every=20,
        search=("optim.peak_lr=log:3e-4..3e-3",),
    )
