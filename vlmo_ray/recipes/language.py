"""Stage 2 of pre-training: language experts on text alone, everything else frozen (paper section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, OptimConfig, Phase, TaskConfig, setting
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.tiny import from_scratch, tiny


@dataclass(frozen=True)
class LanguageConfig(TaskConfig):
    """Masked language modelling on texts."""

    kind: ClassVar[str] = "language"

    mlm_probability: float = setting(0.15, at_least=0, at_most=1)  # of masking a word

    def check(self, config: Config) -> None:
        if "mlm" not in config.model.heads:
            raise UserError("model.heads lacks mlm, which the task language trains")


def language_base() -> Config:
    """The language experts of VLMo-Base: 200k steps of 1,024 texts of 196 tokens, peak rate 2e-4.

    The released program's settings; the paper's appendix has 500k steps of 2,048. Begins from the vision stage:
    `--set init=s3://runs/vision_base`, or an imported BEiT. Not run at this size.
    """
    return Config(
        name="language_base",
        model=replace(MODEL_SIZES["base"], heads=("mlm",), max_text_len=196),
        phases=(Phase(steps=200_000, global_batch=1024),),
        slice_size=16,
        micro_batch=64,
        task=LanguageConfig(),
        optim=OptimConfig(peak_lr=2e-4, warmup_steps=2500),
        cluster=ClusterConfig(min_workers=2, max_workers=16, cpus_per_worker=2, data_cpus_per_worker=4),
    )


def language_base_plus() -> Config:
    """Like base, for the narrow 24-layer model."""
    model = replace(MODEL_SIZES["base_plus"], heads=("mlm",), max_text_len=196)
    return replace(language_base(), name="language_base_plus", model=model)


def language_large() -> Config:
    """Like base, for the large model."""
    model = replace(MODEL_SIZES["large"], heads=("mlm",), max_text_len=196)
    return replace(language_base(), name="language_large", model=model, micro_batch=32)


def language_tiny() -> Config:
    """A tiny model on a CPU; a minute on texts of 24 tokens (`vlmo prepare text ... --option length=24`)."""
    small = tiny()
    return replace(
        small,
        name="language_tiny",
        model=from_scratch(replace(small.model, width=64, heads=("mlm",))),
        task=LanguageConfig(),
        phases=(Phase(steps=200, global_batch=64),),
        micro_batch=64,
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=20),
        checkpoint_every=50,
    )
