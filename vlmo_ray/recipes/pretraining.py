"""Vision-language pre-training as in the paper (sections 4.1 and 4.2): its objective and its runs.

The gather of the published runs carried no gradient, which divided the contrast's gradient at the features by the
number of GPUs. The recipes do the same: 1/64 for base, 1/128 for large. `--set task.feature_grad_scale=1` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, OptimConfig, Phase, TaskConfig
from vlmo_ray.errors import UserError
from vlmo_ray.fields import setting


@dataclass(frozen=True)
class PretrainingConfig(TaskConfig):
    """Weights and options of the terms. The contrastive term is the mean of its branches.

    Matching and masked words of weight 0 are left out, with their passes.
    """

    kind: ClassVar[str] = "pretraining"

    itc: float = setting(1.0, at_least=0)
    itm: float = setting(1.0, at_least=0)
    mlm: float = setting(0.25, at_least=0)
    vl_contrast: bool = True  # a second branch, of states that went through the vision-language experts
    mlm_probability: float = setting(0.15, at_least=0, at_most=1)  # of masking a word
    contrast: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = setting(0.0, at_least=0, below=1)  # of the softmax contrast
    # Multiplies the contrast's gradient at the features, not its value nor the temperatures' gradient. 1 is exact.
    feature_grad_scale: float = setting(1.0, above=0, remedy="1 is exact. To leave the contrast out, set task.itc=0")
    negatives: Literal["global", "local"] = "global"  # from the whole batch, or from the row's own slice
    itm_share: float = 1.0  # the fraction of each slice's rows that matching is computed for
    # Matching sees masked texts, and the masked words are read from its pass over the right pairs: three passes over
    # pairs in place of four. All three see masked texts, or the mask alone would tell which pair is the right one.
    masked_matching: bool = False
    # The share of an image's patches that a step leaves out (FLIP, Li et al. 2023), the same of all its images, and how
    # many steps at the end of the run see all of them.
    patch_dropout: float = setting(0.0, at_least=0, below=1)
    unmasked_steps: int = setting(0, at_least=0)
    # Momentum distillation (ALBEF): the share of the contrast's and the masked words' targets that the average of the
    # weights predicts (`optim.average_decay`; ALBEF: 0.4 and 0.995), and the steps until the share is reached.
    distill: float = setting(0.0, at_least=0, below=1)
    distill_ramp: int = setting(0, at_least=0)

    @property
    def heads(self) -> tuple[str, ...]:
        """Those that the terms need."""
        used = {"itc": True, "itc_vl": self.vl_contrast, "itm": self.itm > 0, "mlm": self.mlm > 0}
        return tuple(name for name, is_used in used.items() if is_used)

    def kept_patches(self, patches: int) -> int:
        """How many of an image's patches are left."""
        return round((1 - self.patch_dropout) * patches)

    def ineffective(self, config: Config) -> dict[str, str]:
        without = {} if self.itm else {"negatives": "task.itm is 0", "itm_share": "task.itm is 0"}
        without |= (
            {} if self.itm and self.mlm else {"masked_matching": "matching and masked words are not both trained"}
        )
        without |= {} if self.patch_dropout else {"unmasked_steps": "task.patch_dropout is 0"}
        without |= {} if self.distill else {"distill_ramp": "task.distill is 0"}
        return without | ({} if self.mlm else {"mlm_probability": "task.mlm is 0"})

    def check(self, config: Config) -> None:
        model, slice_size = config.model, config.slice_size
        if self.vl_contrast and (model.vl_start == model.depth or model.experts == "one"):
            raise UserError(
                "task.vl_contrast=true needs vision-language experts, of which the model has none; set it to false"
            )
        if missing := [head for head in self.heads if head not in model.heads]:
            raise UserError(
                f"model.heads lacks {', '.join(missing)}: the terms of this task need {', '.join(self.heads)}"
            )
        if self.contrast == "sigmoid" and model.init_logit_bias is None:
            raise UserError(
                "task.contrast='sigmoid' needs a bias to learn: set model.init_logit_bias (-10) and "
                "model.init_temperature (0.1)"
            )
        if self.contrast == "softmax" and model.init_logit_bias is not None:
            raise UserError(
                f"model.init_logit_bias={model.init_logit_bias} would never be used by task.contrast='softmax'; "
                "set it to null"
            )
        if self.label_smoothing and self.contrast == "sigmoid":
            raise UserError("task.label_smoothing is only for the softmax contrast; set it to 0 for the sigmoid one")
        if self.distill and not config.optim.average_decay:
            raise UserError(
                f"task.distill={self.distill} needs an average of the weights as its teacher: set optim.average_decay "
                "(0.995)"
            )
        if self.distill and (self.contrast == "sigmoid" or self.label_smoothing):
            raise UserError("task.distill is only for the softmax contrast without task.label_smoothing; set it to 0")
        if not 0 < self.itm_share <= 1 or round(self.itm_share * slice_size) < 1:
            raise UserError(
                f"task.itm_share={self.itm_share} of a slice of {slice_size} rows is less than one row or more than "
                f"all of them; choose from {1 / slice_size:.3g} to 1"
            )
        if self.masked_matching and self.itm_share < 1:
            raise UserError(
                f"task.masked_matching=true reads the masked words of all rows from the passes of matching, which "
                f"task.itm_share={self.itm_share} computes for some rows; set one of them back"
            )
        if self.patch_dropout and not self.kept_patches(model.num_patches):
            raise UserError(
                f"task.patch_dropout={self.patch_dropout} leaves none of the {model.num_patches} patches of an image; "
                "lower it"
            )
        if self.unmasked_steps > config.total_steps:
            raise UserError(
                f"task.unmasked_steps={self.unmasked_steps} is more than the {config.total_steps} steps in phases; "
                "lower it"
            )
        if self.negatives == "local" and slice_size == 1:
            raise UserError(
                "task.negatives='local' draws from a row's own slice, and slice_size=1 has no other row; raise it"
            )


def pretrain_base() -> Config:
    """VLMo-Base on 4M images: 200k steps of 1,024 pairs at 224 px, peak rate 2e-4 (section 4.1).

    The paper's run took two days on 64 V100; `vlmo train pretrain_base --data s3://...`.
    """
    return Config(
        name="pretrain_base",
        model=MODEL_SIZES["base"],
        phases=(Phase(steps=200_000, global_batch=1024),),
        slice_size=16,
        micro_batch=64,
        task=PretrainingConfig(feature_grad_scale=1 / 64),
        optim=OptimConfig(peak_lr=2e-4, warmup_steps=2500),
        cluster=ClusterConfig(min_workers=4, max_workers=16, cpus_per_worker=2, data_cpus_per_worker=8),
    )


def pretrain_base_plus() -> Config:
    """The narrow 24-layer model of the official release: like base, with peak rate 1e-4."""
    base = pretrain_base()
    return replace(
        base, name="pretrain_base_plus", model=MODEL_SIZES["base_plus"], optim=replace(base.optim, peak_lr=1e-4)
    )


def pretrain_large() -> Config:
    """VLMo-Large on 4M images: like base, with peak rate 5e-5 (section 4.1). Three days on 128 V100 in the paper."""
    base = pretrain_base()
    return replace(
        base,
        name="pretrain_large",
        model=MODEL_SIZES["large"],
        # 52 GB of a GPU. For that the unimodal passes run twice: 7 % more FLOPs; recomputed layers would be 33 %.
        micro_batch=32,
        task=PretrainingConfig(feature_grad_scale=1 / 128),
        optim=replace(base.optim, peak_lr=5e-5),
    )


def pretrain_1b() -> Config:
    """VLMo-Large on one billion noisy pairs: 200k steps of 16k, then 100k of 32k (section 4.2).

    Both phases are one run with one optimizer. The paper gives neither the learning rate across the phases nor the
    number of GPUs. Here it is one linear decay over the 300k steps, and the feature_grad_scale of large.
    """
    large = pretrain_large()
    return replace(
        large,
        name="pretrain_1b",
        phases=(Phase(steps=200_000, global_batch=16_384), Phase(steps=100_000, global_batch=32_768)),
        checkpoint_every=250,
        cluster=ClusterConfig(
            min_workers=8,
            max_workers=128,
            cpus_per_worker=2,
            data_cpus_per_worker=10,
            max_failures=1000,
            notice_every=1,  # on 8 GPUs a step of 32k takes half a minute, and a spot node leaves after two
        ),
    )
