"""NLVR2: statements about two photographs (paper section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.vqa import vqa_tiny


@dataclass(frozen=True)
class Nlvr2Config(TaskConfig):
    """Cross-entropy over False and True."""

    kind: ClassVar[str] = "nlvr2"

    head_lr_scale: float = setting(1.0, above=0)  # the head's learning rate / that of the model

    def check(self, config: Config) -> None:
        if "nlvr2" not in config.model.heads:
            raise UserError(f"model.heads={','.join(config.model.heads)} has no 'nlvr2', which the task nlvr2 trains")


def nlvr2_base() -> Config:
    """VLMo-Base on NLVR2 at 384 px; aim: 82.77 on dev, 83.34 on test-P (paper Table 2).

    `vlmo train nlvr2_base --data s3://... --set init=imported/`. Not run at this size.
    """
    return Config(
        name="nlvr2_base",
        model=replace(MODEL_SIZES["base"], heads=("nlvr2",), image_size=384, drop_path=0.1),
        task=Nlvr2Config(),
        phases=(Phase(steps=6_750, global_batch=128),),  # 10 epochs of 86,373 statements
        slice_size=8,
        micro_batch=16,
        optim=OptimConfig(peak_lr=5e-5, warmup_steps=675),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=6),
        search=("optim.peak_lr=5e-5,1e-4",),
    )


def nlvr2_base_plus() -> Config:
    """VLMo-Base-Plus; aim: 85.1 on test-P (model card of the released weights). Not run at this size."""
    base = nlvr2_base()
    model = replace(MODEL_SIZES["base_plus"], heads=("nlvr2",), image_size=384, drop_path=0.2)
    return replace(base, name="nlvr2_base_plus", model=model, optim=replace(base.optim, peak_lr=3e-5))


def nlvr2_large() -> Config:
    """VLMo-Large; aim: 85.64 on dev, 86.86 on test-P (paper Table 2). Not run at this size."""
    base = nlvr2_base()
    return replace(
        base,
        name="nlvr2_large",
        model=replace(MODEL_SIZES["large"], heads=("nlvr2",), image_size=384, drop_path=0.15),
        optim=replace(base.optim, peak_lr=3e-5),
    )


def nlvr2_base_224() -> Config:
    """VLMo-Base at 224 px, the size of the paper's ablations. Not run at this size.

    Aim: 82.09 on dev, 82.49 on test-P from BEiT and the text stage (paper Table 4).
    """
    base = nlvr2_base()
    return replace(base, name="nlvr2_base_224", model=replace(base.model, image_size=224))


def nlvr2_tiny() -> Config:
    """The model of `tiny` for a CPU: minutes on statements about pairs of scenes. Start it from a run of `tiny`."""
    small = vqa_tiny()
    model = replace(small.model, heads=("nlvr2",))
    return replace(small, name="nlvr2_tiny", model=model, task=Nlvr2Config(head_lr_scale=5.0))
