"""What a run is made of: frozen dataclasses and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlmo_ray.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The architecture (paper section 4.1; the sizes are in `MODEL_SIZES`)."""

    width: int
    depth: int
    num_heads: int
    vl_start: int  # the first layer with a vision-language expert, from 0
    position: Literal["relative", "absolute"] = "relative"
    layer_scale: float | None = 0.1
    drop_path: float = 0.1  # at the last layer, growing linearly from 0; also the dropout of text embeddings
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 30522
    max_text_len: int = 40
    bias_text_len: int = 196  # the text length that the relative bias table is sized for
    heads: tuple[str, ...] = ("itc", "itc_vl", "itm", "mlm")  # any of these and "vqa", "nlvr2"
    num_answers: int = 3129  # of the VQA head
    init_std: float = 0.02  # of the truncated normal that weights start from
    init_temperature: float = 0.07  # where the learned temperatures of the contrast start
    init_logit_bias: float | None = None  # of the sigmoid contrast (its paper: -10); None for the softmax one

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# Paper section 4.1: Base has 12 layers, the top two with VL experts; Large 24, the top three. base_plus is the
# released 24-layer narrow model. `tiny` is ours, for a CPU.
MODEL_SIZES: dict[str, ModelConfig] = {
    "base": ModelConfig(width=768, depth=12, num_heads=12, vl_start=10),
    "base_plus": ModelConfig(
        width=544, depth=24, num_heads=16, vl_start=21, position="absolute", layer_scale=None
    ),
    "large": ModelConfig(width=1024, depth=24, num_heads=16, vl_start=21),
    "tiny": ModelConfig(
        width=96, depth=4, num_heads=4, vl_start=3, image_size=32, patch_size=8, max_text_len=24,
        bias_text_len=24, layer_scale=None, drop_path=0.0, init_std=0.06,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """How a record becomes a training row, and how rows are put in order."""

    crop_area: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    randaugment_ops: int = 2
    randaugment_magnitude: int = 7
    mlm_probability: float = 0.15
    group_steps: int = 8  # rows are shuffled within the batches of this many consecutive steps
    bad_shards: Literal["stop", "mask"] = (
        "stop"  # a damaged or missing chunk ends the run, or its rows are masked; without access, it always ends
    )
    patience_s: float = 600.0  # how long storage may be busy or away before the run stops


@dataclass(frozen=True)
class LossConfig:
    """The objective: weights of the terms, the contrastive one being the mean of its two branches; its options."""

    itc: float = 1.0
    itm: float = 1.0
    mlm: float = 0.25
    contrast: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0  # of the softmax contrast
    # Multiplies the contrast's gradient at the features, not its value nor the temperatures' gradient. 1 is
    # exact. The released models' gather had no gradient, which left 1 / number of GPUs: 1/64 or 1/128.
    feature_grad_scale: float = 1.0
    negatives: Literal["global", "local"] = "global"  # drawn from the whole batch or from the row's own slice
    itm_share: float = 1.0  # of each slice's rows that matching is computed for


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, then linear decay to 0 (paper section 4.1)."""

    peak_lr: float = 2e-4
    warmup_steps: int = 2500
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one global batch; phases follow one another in one run."""

    steps: int
    global_batch: int


@dataclass(frozen=True)
class ClusterConfig:
    """What the run asks of Ray and of each worker. Nothing here changes a number of the run beyond rounding."""

    min_workers: int = 1
    max_workers: int = 1
    gpus_per_worker: int = 1  # 0: train on CPUs, in float32
    cpus_per_worker: float = 1.0  # for training itself
    data_cpus_per_worker: int = 2  # tasks that read and decode at once, reserved with the worker on its node
    strategy: Literal["ddp", "fsdp"] = "ddp"  # the model whole on every worker, or sharded layer by layer
    activation_checkpointing: bool = (
        False  # recompute each layer in the backward: less memory, a third more FLOPs
    )
    compile: bool = False  # torch.compile of each layer
    max_failures: int = 8
    start_timeout_s: float = 10.0
    resize_interval_s: float = 60.0
    notice_every: int = 5  # steps between looks for a preemption notice or a request to stop


@dataclass(frozen=True)
class Config:
    """A whole run, resolved. The same config and data set give the same curve on any number of workers."""

    name: str
    model: ModelConfig
    phases: tuple[Phase, ...]
    slice_size: int  # rows in the unit that is dealt to workers
    micro_batch: int  # rows a worker runs forward and backward at once; a multiple of slice_size
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    precision: Literal["auto", "bf16", "float32", "float64"] = (
        "auto"  # auto: bf16 on a GPU, float32 elsewhere
    )
    seed: int = 1
    init: str = ""  # weights to start from: a folder or file that `vlmo_ray.load` reads; "" = at random
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 3  # the newest ones
    keep_every: int = 0  # and those at multiples of so many steps, for good; 0: none
    audit: bool = False  # write down which pairs every step consumed, for `vlmo audit`
    log_every: int = 20  # steps

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


HEADS = ("itc", "itc_vl", "itm", "mlm", "vqa", "nlvr2")


def check_model(model: ModelConfig) -> ModelConfig:
    """Returns the architecture if its numbers fit together, else raises a UserError with the remedy."""
    if model.image_size % model.patch_size or model.image_size < model.patch_size:
        sizes = [model.image_size // model.patch_size * model.patch_size + d for d in (0, model.patch_size)]
        raise UserError(
            f"model.image_size={model.image_size} is not a multiple of model.patch_size={model.patch_size}; "
            f"use {' or '.join(str(s) for s in sizes if s)}"
        )
    if model.width % model.num_heads:
        raise UserError(f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}")
    if not 0 <= model.vl_start <= model.depth:
        raise UserError(
            f"model.vl_start={model.vl_start} must be from 0 to {model.depth}, the number of layers"
        )
    if model.position not in ("relative", "absolute"):
        raise UserError(f"model.position={model.position!r} must be 'relative' or 'absolute'")
    if not 0 <= model.drop_path < 1:
        raise UserError(f"model.drop_path={model.drop_path} must be a rate from 0 to below 1")
    if model.position == "relative" and model.max_text_len > model.bias_text_len:
        raise UserError(
            f"model.max_text_len={model.max_text_len} is above model.bias_text_len={model.bias_text_len}, the text "
            "length of the relative bias table; lower the first or raise the second"
        )
    if model.init_temperature <= 0:
        raise UserError(
            f"model.init_temperature={model.init_temperature} must be above 0; the paper has 0.07"
        )
    if model.max_text_len < 3:
        raise UserError(
            f"model.max_text_len={model.max_text_len} leaves no room between [CLS] and [SEP]; use >= 3"
        )
    if unknown := sorted(set(model.heads) - set(HEADS)):
        raise UserError(f"model.heads names {', '.join(unknown)}; known: {', '.join(HEADS)}")
    return model


def check(config: Config) -> Config:
    """Returns the config if it can run, else raises a UserError that names the field and the remedy."""
    model = check_model(config.model)
    if not config.phases or any(p.steps < 1 or p.global_batch < 1 for p in config.phases):
        raise UserError(
            f"phases={config.phases} must name at least one phase, with steps and global_batch >= 1"
        )
    if config.slice_size < 1 or config.micro_batch < 1 or config.micro_batch % config.slice_size:
        raise UserError(
            f"micro_batch={config.micro_batch} is not a positive multiple of slice_size={config.slice_size}"
        )
    for phase in config.phases:
        if phase.global_batch % config.slice_size or phase.global_batch % config.micro_batch:
            raise UserError(
                f"a global batch of {phase.global_batch} does not divide into micro-batches of "
                f"{config.micro_batch}; choose micro_batch and slice_size so that both divide it"
            )
    slices = min(phase.global_batch for phase in config.phases) // config.slice_size
    cluster = config.cluster
    if not 1 <= cluster.min_workers <= cluster.max_workers:
        raise UserError(
            f"cluster.min_workers={cluster.min_workers} and cluster.max_workers={cluster.max_workers} "
            "must satisfy 1 <= min <= max"
        )
    if cluster.max_workers > slices:
        raise UserError(
            f"cluster.max_workers={cluster.max_workers} is more than the {slices} slices of {config.slice_size} rows "
            "in a global batch; lower max_workers or slice_size"
        )
    if config.optim.warmup_steps >= config.total_steps:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} leaves nothing of the {config.total_steps} steps in "
            "phases; lower it"
        )
    if model.vl_start == model.depth:
        raise UserError(
            f"model.vl_start={model.vl_start} leaves no layer with a vision-language expert; lower it"
        )
    if missing := [head for head in ("itc", "itc_vl", "itm", "mlm") if head not in model.heads]:
        raise UserError(
            f"model.heads lacks {', '.join(missing)}: pre-training needs the heads itc, itc_vl, itm and mlm"
        )
    _check_loss(config)
    _check_data(config.data)
    for path in (
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "data.group_steps",
        "cluster.notice_every",
        "cluster.data_cpus_per_worker",
    ):
        if _get(config, path) < 1:
            raise UserError(f"{path}={_get(config, path)} must be at least 1")
    if config.keep_every < 0 or config.keep_every % config.checkpoint_every:
        raise UserError(
            f"keep_every={config.keep_every} must be a multiple of checkpoint_every={config.checkpoint_every}, or 0"
        )
    return config


def _check_data(data: DataConfig) -> None:
    if data.patience_s < 0:
        raise UserError(f"data.patience_s={data.patience_s} must be 0 (no patience) or more seconds")


def _check_loss(config: Config) -> None:
    loss, bias = config.loss, config.model.init_logit_bias
    if loss.contrast == "sigmoid" and bias is None:
        raise UserError(
            "loss.contrast='sigmoid' needs a bias to learn: set model.init_logit_bias (-10) and "
            "model.init_temperature (0.1)"
        )
    if loss.contrast == "softmax" and bias is not None:
        raise UserError(
            f"model.init_logit_bias={bias} would never be used by loss.contrast='softmax'; set it to null"
        )
    if not 0 <= loss.label_smoothing < 1:
        raise UserError(f"loss.label_smoothing={loss.label_smoothing} must be from 0 to below 1")
    if loss.label_smoothing and loss.contrast == "sigmoid":
        raise UserError("loss.label_smoothing is of the softmax contrast; set it to 0 for the sigmoid one")
    if loss.feature_grad_scale <= 0:
        raise UserError(
            f"loss.feature_grad_scale={loss.feature_grad_scale} must be above 0; 1 is exact. To leave the "
            "contrast out, set loss.itc=0"
        )
    if not 0 < loss.itm_share <= 1 or round(loss.itm_share * config.slice_size) < 1:
        raise UserError(
            f"loss.itm_share={loss.itm_share} of a slice of {config.slice_size} rows is less than one row, or more "
            f"than all; choose from {1 / config.slice_size:.3g} to 1"
        )
    if loss.negatives == "local" and config.slice_size == 1:
        raise UserError(
            "loss.negatives='local' draws from a row's own slice, and slice_size=1 has no other row; raise it"
        )


def ineffective(config: Config) -> dict[str, str]:
    """Fields that change nothing under this config, and why; setting one by hand is a mistake worth naming."""
    out = {}
    if config.model.position == "absolute":
        out["model.bias_text_len"] = "model.position is 'absolute', which has no relative bias table"
    if "vqa" not in config.model.heads:
        out["model.num_answers"] = "model.heads has no 'vqa'"
    if config.data.randaugment_ops == 0:
        out["data.randaugment_magnitude"] = "data.randaugment_ops is 0"
    return out


def _get(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config
