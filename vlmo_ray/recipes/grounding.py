"""Visual grounding, weakly supervised: pairs alone teach where an expression points (not in the paper; ALBEF's way)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, Phase
from vlmo_ray.errors import UserError
from vlmo_ray.fields import setting
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.recipes.tiny import tiny


@dataclass(frozen=True)
class GroundingConfig(PretrainingConfig):
    """The main contrast and matching. No box is read in training."""

    kind: ClassVar[str] = "grounding"
    uneven_evaluation: ClassVar[bool] = True

    itm: float = setting(1.0, above=0)
    mlm: float = setting(0.0, at_least=0)
    vl_contrast: bool = False
    layer: int = setting(-1, at_least=-1, resume="free")  # whose attention an evaluation reads; see `attended_layer`

    def check(self, config: Config) -> None:
        super().check(config)
        attended_layer(config.model, self.layer)


def attended_layer(model: ModelConfig, layer: int = -1) -> int:
    """The number of the layer whose attention is read, from 0. Raises UserError for one that cannot be read.

    -1 is the first layer with vision-language experts. If that is the last layer, only [T_CLS] is read of it, and the
    other words have no gradient there; it points best all the same (docs/tasks/grounding.md). ALBEF reads the third of
    its six fusion layers, and found one layer far better than its neighbours: choose it on validation data.
    """
    if layer == -1:
        layer = min(model.vl_start, model.depth - 1)
    if not 0 <= layer < model.depth:
        raise UserError(f"layer={layer} is none of the model's {model.depth} layers, which count from 0; name another")
    if model.attention == "separate" and layer < model.vl_start:
        raise UserError(
            f"in layer={layer} of this model no text attends to an image (attention='separate'); name one from "
            f"{model.vl_start} on"
        )
    return layer


def grounding_refcoco_plus_base() -> Config:
    """VLMo-Base on RefCOCO+ at 384 px with ALBEF's settings. Not run at this size.

    The paper has no number. ALBEF, after 14M images, has 58.46 on val, 65.89 on testA and 46.25 on testB, with the
    boxes of a detector as proposals; COCO's images, these among them, were in its pre-training.

    `vlmo train grounding_refcoco_plus_base --data s3://... --set init=s3://bucket/runs/pretrain_base`
    """
    return Config(
        name="grounding_refcoco_plus_base",
        model=replace(MODEL_SIZES["base"], heads=("itc", "itm"), image_size=384, drop_path=0.1),
        task=GroundingConfig(),
        phases=(Phase(steps=2345, global_batch=256),),  # 5 epochs of 120,191 expressions
        slice_size=16,
        micro_batch=16,
        data=DataConfig(crop=False),
        optim=OptimConfig(peak_lr=1e-5, warmup_steps=100, weight_decay=0.02, schedule="cosine"),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=6),
    )


def grounding_refcoco_plus_large() -> Config:
    """VLMo-Large on RefCOCO+. Not run at this size."""
    base = grounding_refcoco_plus_base()
    model = replace(MODEL_SIZES["large"], heads=("itc", "itm"), image_size=384, drop_path=0.15)
    return replace(base, name="grounding_refcoco_plus_large", model=model)


def grounding_tiny() -> Config:
    """The model of `tiny` for a CPU: minutes on expressions about scenes. Start it from a run of `tiny`."""
    small = tiny()
    return replace(
        small,
        name="grounding_tiny",
        model=replace(small.model, heads=("itc", "itm")),
        task=GroundingConfig(),
        phases=(Phase(steps=200, global_batch=96),),
        slice_size=16,
        micro_batch=96,
        data=DataConfig(crop=False),
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=20),
        checkpoint_every=50,
        log_every=20,
        search=("optim.peak_lr=log:1e-4..3e-3",),
    )
