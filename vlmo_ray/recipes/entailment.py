"""Visual entailment on SNLI-VE (not in the paper; the settings are ALBEF's)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, POOLED_HEADS, ClusterConfig, Config, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.vqa import vqa_tiny


@dataclass(frozen=True)
class EntailmentConfig(TaskConfig):
    """Cross-entropy over the classes of the data set."""

    kind: ClassVar[str] = "entailment"

    head_lr_scale: float = setting(1.0, above=0)  # the head's learning rate / that of the model

    def check(self, config: Config) -> None:
        if not set(POOLED_HEADS) & set(config.model.heads):
            raise UserError(
                f"model.heads={','.join(config.model.heads)} has none of {', '.join(POOLED_HEADS)}: they come with the "
                "pooler, which the task entailment reads; write for example model.heads=itm"
            )


def entailment_base() -> Config:
    """VLMo-Base on SNLI-VE at 384 px. Not run at this size; the paper has no number, ALBEF (4M pairs) has 80.3 on test.

    Start from weights that have not seen Flickr30k's captions: the images of SNLI-VE's dev set are among them.
    """
    return Config(
        name="entailment_base",
        model=replace(MODEL_SIZES["base"], heads=("itm",), image_size=384, drop_path=0.1),
        task=EntailmentConfig(),
        phases=(Phase(steps=10_340, global_batch=256),),  # 5 epochs of 529,527 sentences
        slice_size=16,
        micro_batch=16,
        optim=OptimConfig(peak_lr=2e-5, warmup_steps=100, weight_decay=0.02, schedule="cosine"),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=6),
    )


def entailment_base_plus() -> Config:
    """VLMo-Base-Plus on SNLI-VE. Not run at this size."""
    base = entailment_base()
    model = replace(MODEL_SIZES["base_plus"], heads=("itm",), image_size=384)
    return replace(base, name="entailment_base_plus", model=model)


def entailment_large() -> Config:
    """VLMo-Large on SNLI-VE. Not run at this size."""
    base = entailment_base()
    model = replace(MODEL_SIZES["large"], heads=("itm",), image_size=384, drop_path=0.15)
    return replace(base, name="entailment_large", model=model, optim=replace(base.optim, peak_lr=1e-5))


def entailment_tiny() -> Config:
    """The model of `tiny` for a CPU. Start it from a run of `tiny`."""
    small = vqa_tiny()
    model = replace(small.model, heads=("itm",))
    return replace(small, name="entailment_tiny", model=model, task=EntailmentConfig(head_lr_scale=5.0))
