"""Visual question answering as classification over a list of answers (paper section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.tiny import tiny


@dataclass(frozen=True)
class VqaConfig(TaskConfig):
    """Binary cross-entropy with soft scores, summed over the answers of the list."""

    kind: ClassVar[str] = "vqa"

    head_lr_scale: float = setting(20.0, above=0)  # the head's learning rate / that of the model

    def check(self, config: Config) -> None:
        if "vqa" not in config.model.heads:
            raise UserError(f"model.heads={','.join(config.model.heads)} has no 'vqa', which the task vqa trains")


def vqa_base() -> Config:
    """VLMo-Base on VQA v2 at 480 px; aim: 76.64 on test-dev, 76.89 on test-std (paper Table 2).

    `vlmo train vqa_base --data s3://... --set init=imported/`. Not run at this size.
    """
    return Config(
        name="vqa_base",
        model=replace(MODEL_SIZES["base"], heads=("vqa",), image_size=480, drop_path=0.15),
        task=VqaConfig(),
        # 10 epochs of the 443,757 + 214,354 questions of train and val less some without a known answer
        phases=(Phase(steps=50_000, global_batch=128),),
        slice_size=8,
        micro_batch=16,
        data=DataConfig(flip=False),
        optim=OptimConfig(peak_lr=3e-5, warmup_steps=5_000),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=6),
        search=("optim.peak_lr=log:1e-5..1e-4",),
    )


def vqa_base_plus() -> Config:
    """VLMo-Base-Plus; aim: 78.5 on test-dev (model card of the released weights). Not run at this size."""
    base = vqa_base()
    model = replace(MODEL_SIZES["base_plus"], heads=("vqa",), image_size=480, drop_path=0.15)
    return replace(base, name="vqa_base_plus", model=model)


def vqa_large() -> Config:
    """VLMo-Large; aim: 79.94 on test-dev, 79.98 on test-std (paper Table 2). Not run at this size."""
    base = vqa_base()
    return replace(
        base,
        name="vqa_large",
        model=replace(MODEL_SIZES["large"], heads=("vqa",), image_size=480, drop_path=0.15),
        optim=replace(base.optim, peak_lr=1.5e-5),
    )


def vqa_base_224() -> Config:
    """VLMo-Base at 224 px, the size of the paper's ablations. Not run at this size."""
    base = vqa_base()
    return replace(base, name="vqa_base_224", model=replace(base.model, image_size=224), micro_batch=32, slice_size=16)


def vqa_tiny() -> Config:
    """The model of `tiny` for a CPU: a few minutes on questions about scenes. Start it from a run of `tiny`."""
    small = tiny()
    return replace(
        small,
        name="vqa_tiny",
        model=replace(small.model, heads=("vqa",)),
        task=VqaConfig(head_lr_scale=5.0),
        phases=(Phase(steps=400, global_batch=64),),
        slice_size=16,
        micro_batch=64,
        data=DataConfig(flip=False, randaugment_ops=0, crop_area=(1.0, 1.0)),
        optim=OptimConfig(peak_lr=5e-4, warmup_steps=40),
        checkpoint_every=100,
        log_every=20,
        search=("optim.peak_lr=log:1e-4..3e-3",),
    )
