"""The config of a run: frozen dataclasses. Each field states its bounds and whether a resumed run may change it.

`check` tests each field alone, then the fields of a section together (its `check` method), then the sections together
(`Config.check`), and last what the task requires (its `check`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlmo_ray.errors import UserError
from vlmo_ray.fields import check_fields, setting

HEADS = ("itc", "itc_vl", "itm", "mlm", "vqa", "nlvr2")
POOLED_HEADS = ("itm", "vqa", "nlvr2")  # those that read the pooler


@dataclass(frozen=True)
class ModelConfig:
    """The architecture (paper section 4.1; `MODEL_SIZES` has the sizes).

    `Config.model` marks these fields as `fixed` on resume; those that change no weight's shape are marked otherwise.
    """

    width: int = setting(at_least=1)
    depth: int = setting(at_least=1)
    num_heads: int = setting(at_least=1)
    vl_start: int = setting(at_least=0)  # the first layer with a vision-language expert, from 0; `depth`: none has
    # "one": one feed-forward network for all tokens, as in a standard Transformer (paper Table 5).
    experts: Literal["modality", "one"] = "modality"
    # "separate": below `vl_start` texts and images have attention of their own, also those of a pair (Table 7).
    attention: Literal["shared", "separate"] = "shared"
    position: Literal["relative", "absolute"] = "relative"
    layer_scale: float | None = 0.1
    # The rate at the last layer; it grows linearly from 0. Also the dropout of text embeddings.
    drop_path: float = setting(0.1, at_least=0, below=1, resume="ask")
    image_size: int = setting(224, at_least=1)
    patch_size: int = setting(16, at_least=1)
    vocab_size: int = setting(30522, at_least=1)
    max_text_len: int = setting(40, at_least=3, remedy="[CLS] and [SEP] take two")
    bias_text_len: int = setting(196, at_least=1)  # the text length that the relative bias table has room for
    heads: tuple[str, ...] = ("itc", "itc_vl", "itm", "mlm")  # any of HEADS
    num_answers: int = setting(3129, at_least=1)  # of the VQA head
    # The standard deviation of the truncated normal that initialises weights.
    init_std: float = setting(0.02, at_least=0, resume="ask")
    # The initial value of the learned temperatures of the contrast.
    init_temperature: float = setting(0.07, above=0, remedy="the paper has 0.07", resume="ask")
    init_logit_bias: float | None = None  # of the sigmoid contrast (its paper: -10); None: softmax contrast

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def check(self) -> None:
        if self.image_size % self.patch_size:
            sizes = [self.image_size // self.patch_size * self.patch_size + d for d in (0, self.patch_size)]
            raise UserError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}; "
                f"use {' or '.join(str(s) for s in sizes if s)}"
            )
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} is not a multiple of model.num_heads={self.num_heads}")
        if self.vl_start > self.depth:
            raise UserError(f"model.vl_start={self.vl_start} must be from 0 to {self.depth}, the number of layers")
        if self.position == "relative" and self.max_text_len > self.bias_text_len:
            raise UserError(
                f"model.max_text_len={self.max_text_len} is above model.bias_text_len={self.bias_text_len}, the text "
                "length of the relative bias table; lower the first or raise the second"
            )
        if self.experts == "one" and self.attention == "separate":
            raise UserError(
                "model.experts='one' and model.attention='separate' exclude each other: set one of them back"
            )
        if unknown := sorted(set(self.heads) - set(HEADS)):
            raise UserError(f"model.heads names {', '.join(unknown)}; known: {', '.join(HEADS)}")

    def ineffective(self) -> dict[str, str]:
        out = {}
        if self.position == "absolute":
            out["bias_text_len"] = "model.position is 'absolute', which has no relative bias table"
        if "vqa" not in self.heads:
            out["num_answers"] = "model.heads has no 'vqa'"
        return out


# Paper section 4.1: Base has 12 layers, the top two with VL experts; Large has 24, the top three with VL experts.
# `base_plus` is the released narrow model of 24 layers. `tiny` is ours, for a CPU.
MODEL_SIZES: dict[str, ModelConfig] = {
    "base": ModelConfig(width=768, depth=12, num_heads=12, vl_start=10),
    "base_plus": ModelConfig(
        width=544, depth=24, num_heads=16, vl_start=21, position="absolute", layer_scale=None
    ),
    "large": ModelConfig(width=1024, depth=24, num_heads=16, vl_start=21),
    "tiny": ModelConfig(
        width=96, depth=4, num_heads=4, vl_start=3, image_size=32, patch_size=8, max_text_len=24,
        bias_text_len=24, layer_scale=None, drop_path=0.0, init_std=96**-0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """How a record becomes a training row, and how rows are shuffled."""

    crop: bool = True  # False: the whole image is resized
    crop_area: tuple[float, float] = (0.5, 1.0)  # the smallest and the largest fraction of the image's area
    flip: bool = True
    randaugment_ops: int = setting(2, at_least=0)
    randaugment_magnitude: int = setting(7, at_least=0, at_most=10)
    # Of RandAugment: "vlmo" has ten operations, all at the magnitude above; "timm" the fifteen of
    # rand-m9-mstd0.5-inc1, each at a magnitude drawn around it.
    augment: Literal["vlmo", "timm"] = "vlmo"
    erase: float = setting(0.0, at_least=0, at_most=1)  # the share of images of which a rectangle becomes noise
    # "pillow" resizes as runs did before there was a choice: the same to 0.2 of 255 on average, and slower.
    decoder: Literal["fast", "pillow"] = "fast"
    # Of several data sets, what share of each batch comes from each, up to whole slices; (): as many as it has rows.
    weights: tuple[float, ...] = ()
    shuffle_steps: int = setting(8, at_least=1)  # rows are shuffled within a span of this many steps
    # Whether a damaged or missing chunk ends the run or has its rows masked. Denied access always ends the run.
    bad_shards: Literal["stop", "mask"] = setting("stop", resume="free")
    # How long storage may be busy or unreachable before the run stops.
    retry_timeout_s: float = setting(600.0, at_least=0, remedy="0 does not retry", resume="free")

    def check(self) -> None:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError(f"data.crop_area={self.crop_area} must satisfy 0 < smallest <= largest <= 1")

    def ineffective(self) -> dict[str, str]:
        unused = () if self.randaugment_ops else ("randaugment_magnitude", "augment")
        without = dict.fromkeys(unused, "data.randaugment_ops is 0")
        return without | ({} if self.crop else {"crop_area": "data.crop is false"})


@dataclass(frozen=True)
class TaskConfig:
    """What the model learns: one subclass per task. Stored configs name the task by its `kind`."""

    kind: ClassVar[str]
    # Whether an evaluation's number of passes depends on the rows, or a pass needs gradients. FSDP workers must all run
    # the same passes.
    uneven_evaluation: ClassVar[bool] = False
    kinds: ClassVar[dict[str, type[TaskConfig]]] = {}  # all tasks by kind

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:  # a base class that tasks share has none
            TaskConfig.kinds[cls.kind] = cls

    def check(self, config: Config) -> None:
        """Raises a UserError if the task cannot run under `config`."""

    def ineffective(self, config: Config) -> dict[str, str]:
        """Fields of the task that change nothing under `config`, and the reason."""
        return {}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, then decay to 0 (paper section 4.1)."""

    peak_lr: float = setting(2e-4, at_least=0)
    warmup_steps: int = setting(2500, at_least=0)
    schedule: Literal["linear", "cosine"] = "linear"  # of the decay
    weight_decay: float = setting(0.01, at_least=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.98, at_least=0, below=1)
    eps: float = setting(1e-8, at_least=0)
    clip_norm: float = setting(0.0, at_least=0)  # the largest norm of the whole gradient; 0: no clipping
    average_decay: float = setting(0.0, at_least=0, below=1)  # of the moving average of the weights; 0: no average
    # How many steps in a row may be left out because loss or gradient are not finite, before the run stops.
    skip_nonfinite: int = setting(0, at_least=0, resume="free")


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with one global batch size. A run has one or more phases."""

    steps: int = setting(at_least=1)
    global_batch: int = setting(at_least=1)


@dataclass(frozen=True)
class ClusterConfig:
    """What the run asks of Ray and of each worker. Nothing here changes the curve beyond rounding."""

    min_workers: int = 1
    max_workers: int = 1
    # 0: train on CPUs, in float32
    gpus_per_worker: int = setting(1, at_least=0, at_most=1, remedy="for more GPUs, raise cluster.max_workers")
    cpus_per_worker: float = setting(1.0, at_least=0)  # for the training process
    # CPUs for tasks that read and decode, reserved together with the worker on its node.
    data_cpus_per_worker: int = setting(2, at_least=1)
    strategy: Literal["ddp", "fsdp"] = "ddp"  # the whole model on every worker, or sharded layer by layer
    # Recomputes each layer in the backward: less memory, a third more FLOPs.
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of each layer
    max_failures: int = setting(8, at_least=-1)  # without a checkpoint in between; -1: no limit
    start_timeout_s: float = setting(10.0, at_least=0)
    resize_interval_s: float = setting(60.0, at_least=0)
    notice_every: int = setting(5, at_least=1)  # steps between checks for a preemption notice or a stop request

    def check(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise UserError(
                f"cluster.min_workers={self.min_workers} and cluster.max_workers={self.max_workers} "
                "must satisfy 1 <= min <= max"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. The same config and data set give the same curve on any number of workers."""

    name: str
    model: ModelConfig = setting(resume="fixed")
    phases: tuple[Phase, ...]
    slice_size: int = setting(at_least=1)  # rows of a slice, the unit that is dealt to workers
    # Rows per forward and backward of a worker; a multiple of slice_size.
    micro_batch: int = setting(at_least=1, resume="free")
    task: TaskConfig
    data: DataConfig = setting(factory=DataConfig)
    optim: OptimConfig = setting(factory=OptimConfig)
    cluster: ClusterConfig = setting(factory=ClusterConfig, resume="free")
    # auto: bf16 on a GPU, else float32
    precision: Literal["auto", "bf16", "float32", "float64"] = "auto"
    seed: int = 1
    # Weights to start from: a folder or file that `vlmo_ray.load` reads; "": random weights.
    init: str = setting("", resume="free")
    checkpoint_every: int = setting(1000, at_least=1, resume="free")  # steps
    keep_checkpoints: int = setting(3, at_least=1, resume="free")  # how many of the newest ones
    # Also keep the checkpoints at multiples of this many steps, for good; 0: none.
    keep_every: int = setting(0, at_least=0, resume="free")
    evaluate_every: int = setting(0, at_least=0, resume="free")  # steps; 0: no evaluation inside the run
    # Record which pairs every step consumed, for `vlmo audit`.
    audit: bool = setting(False, resume="free")
    # What the experts of a kind start from, after `init`: a copy of another kind, in every layer. "": as they are
    # (random, where `init` has none).
    start_text_experts: Literal["", "image"] = setting("", resume="free")
    start_vl_experts: Literal["", "image", "text"] = setting("", resume="free")
    log_every: int = setting(20, at_least=1, resume="free")  # steps
    log_json: bool = setting(False, resume="free")  # the driver's console: a JSON object for each event
    # Experiment trackers that the driver feeds: mlflow, trackio, wandb.
    trackers: tuple[str, ...] = setting((), resume="free")
    search: tuple[str, ...] = setting((), resume="free")  # what `vlmo tune` searches, as its --space takes it

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def check(self) -> None:
        if not self.phases:
            raise UserError("phases=() must name at least one phase, with its steps and its global_batch")
        if self.micro_batch % self.slice_size:
            raise UserError(
                f"micro_batch={self.micro_batch} is not a positive multiple of slice_size={self.slice_size}"
            )
        for phase in self.phases:
            if phase.global_batch % self.micro_batch:
                raise UserError(
                    f"a global batch of {phase.global_batch} does not divide into micro-batches of "
                    f"{self.micro_batch}; choose micro_batch and slice_size so that both divide it"
                )
        if self.evaluate_every and self.cluster.strategy == "fsdp" and self.task.uneven_evaluation:
            raise UserError(
                f"evaluate_every={self.evaluate_every}: {self.task.kind} cannot be evaluated inside a run with "
                "cluster.strategy='fsdp', whose workers must all run the same passes; set evaluate_every=0 and use "
                "`vlmo evaluate`, or cluster.strategy=ddp"
            )
        slices = min(phase.global_batch for phase in self.phases) // self.slice_size
        if self.cluster.max_workers > slices:
            raise UserError(
                f"cluster.max_workers={self.cluster.max_workers} is more than the {slices} slices of "
                f"{self.slice_size} rows in a global batch; lower max_workers or slice_size"
            )
        if self.optim.warmup_steps >= self.total_steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} leaves nothing of the {self.total_steps} steps in "
                "phases; lower it"
            )
        if self.model.experts == "one" and (self.start_text_experts or self.start_vl_experts):
            raise UserError("start_text_experts and start_vl_experts need model.experts='modality'")
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                f"keep_every={self.keep_every} must be a multiple of checkpoint_every={self.checkpoint_every}, or 0"
            )


def check(config: Config) -> Config:
    """Returns the config if it can run; else raises UserError that names the field and the remedy."""
    _check_section(config, "")
    config.task.check(config)
    return config


def check_model(model: ModelConfig) -> ModelConfig:
    """Returns the architecture if its numbers fit together; else raises UserError with the remedy."""
    _check_section(model, "model.")
    return model


def _check_section(section: Any, prefix: str) -> None:
    """Checks each field of the section, then the sections inside it, then its fields together."""
    check_fields(section, prefix)
    for field in dataclasses.fields(section):
        for path, inner in _sections(prefix + field.name, getattr(section, field.name)):
            _check_section(inner, f"{path}.")
    if hasattr(section, "check") and not isinstance(section, TaskConfig):  # a task's check needs the whole config
        section.check()


def _sections(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The dataclasses that a field holds, with their paths."""
    if dataclasses.is_dataclass(value):
        yield path, value
    elif isinstance(value, tuple):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(value) if dataclasses.is_dataclass(item))


def ineffective(config: Config) -> dict[str, str]:
    """Fields that change nothing under this config, and the reason. `--set` refuses them."""
    out = {}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if hasattr(section, "ineffective"):
            given = (config,) if isinstance(section, TaskConfig) else ()
            out |= {f"{field.name}.{name}": why for name, why in section.ineffective(*given).items()}
    return out
