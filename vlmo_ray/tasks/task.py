"""What a task is: the interface that the loop, the step, the launcher and the evaluation work with.

A `Task` turns batches into named loss terms, row by row: VQA, classification. A `GlobalTask` first looks at the
whole global batch, since one row's loss depends on the others: contrast, hard negatives. An `Evaluation` turns rows
into scores. A new task is one file here, one encoder, and one recipe with its config.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vlmo_ray import rng
from vlmo_ray.config import HEADS, Config, ModelConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Encoder
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.flops import pass_flops
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.gather import Workers

T = TypeVar("T")
Counts = dict[str, Tensor]
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Term:
    """One named part of the loss, for some of this worker's rows."""

    loss: Tensor  # 0-d: the sum over these rows, divided by the count of such rows in the whole step
    weight: float = 1.0
    value: Tensor | None = None  # what to report, where `loss` is a stand-in that only carries gradients

    def __add__(self, other: Term) -> Term:
        return Term(self.loss + other.loss, self.weight, self.reported + other.reported)

    @property
    def reported(self) -> Tensor:
        return self.loss.detach() if self.value is None else self.value


@dataclass(frozen=True)
class Losses:
    """The terms, and whatever else the metrics need summed over all rows of the step (0-d tensors)."""

    terms: dict[str, Term]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Losses) -> Losses:
        terms = self.terms | {name: self.terms[name] + term for name, term in other.terms.items()}
        return Losses(terms, self.sums | other.sums)

    def total(self) -> Tensor:
        """The weighted sum that is differentiated."""
        return weighted({name: term.loss for name, term in self.terms.items()}, self.weights)

    @property
    def weights(self) -> dict[str, float]:
        return {name: term.weight for name, term in self.terms.items()}


def weighted(values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The sum of `values`, each times its weight, in the order of `weights`."""
    first, *rest = weights
    total = weights[first] * values[first]
    for name in rest:
        total = total + weights[name] * values[name]
    return total


@dataclass(frozen=True)
class Score:
    """One metric of an evaluation."""

    value: float
    chance: float | None  # what guessing would give; None where that says nothing
    count: int  # rows, queries or pixels that it is the mean of
    is_share: bool = True  # from 0 to 1, and printed as a percentage


class Evaluation:
    """Rows of a data set -> scores. The result depends neither on workers nor on how rows are cut into batches.

    An evaluation is made for one schema, that of the data set.
    """

    def encoder(self) -> Encoder:
        """Called with `draw` None."""
        raise NotImplementedError

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        """What the score needs of each row, `[B, ...]`. Called without gradients, on any worker."""
        raise NotImplementedError

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        """The metrics. `blocks` holds the valid rows only, in the order of the data set, chunk by chunk."""
        raise NotImplementedError

    def predictions(self, block: Columns) -> Columns:
        """What was predicted for each valid row: id, prediction, score and, where it is known, truth; {} if nothing."""
        return {}

    def remark(self, scores: dict[str, Score]) -> str:
        """What a person should know beside the scores, "" if nothing."""
        return ""

    def submission(self, ids: list[str], predictions: list[str]) -> bytes:
        """The file that the benchmark's server takes. Raises UserError if there is no such form."""
        raise UserError("this task has no form of submission; the run keeps its predictions as Parquet")


class ZeroShot(Evaluation):
    """An evaluation of any model that has the heads for it, whatever it was trained for."""

    def __init__(self, model: VLMo, schema: Schema, **options: Any):
        raise NotImplementedError


@dataclass(frozen=True)
class Pass:
    """A forward pass over one row: `text_len` text tokens, and those of an image, through the model or its top."""

    text_len: int
    image: bool
    num_layers: int | None = None  # None: all
    times: int = 1  # so many over each row run as one

    def size(self, config: ModelConfig) -> tuple[int, int]:
        """(tokens, layers)."""
        tokens = self.text_len + (1 + config.num_patches if self.image else 0)
        return tokens, config.depth if self.num_layers is None else self.num_layers


class Task(nn.Module):
    """A model with what one task adds to it; a row's loss depends on that row alone.

    Rows with `valid` False must add nothing to any loss, count or sum. Parameters of the task's own (a head) are
    attributes beside `model`; they are stored as `task.<name>`, those of the model under their own names.
    """

    shown: tuple[str, ...] = ()  # metrics on the console line, beside the loss
    kept_patches: int | None = None  # of an image, that the passes of a step see; None: all
    repeated: int = 0  # how many of `passes`, from the first, run twice if there are several micro-batches

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__()
        self.model = model
        self.seed = config.seed

    def forward(self, method, *args):
        """Calls a method. DDP and FSDP see every pass, as each goes through here."""
        return method(*args)

    def encoder(self) -> Encoder:
        raise NotImplementedError

    def trainable(self, name: str) -> bool:
        """Whether the parameter `name` is trained. A frozen one has no optimizer state.

        A parameter that takes no part in the loss must be frozen: DDP waits for its gradient.
        """
        return True

    def lr_scale(self, name: str) -> float:
        """Multiplies the learning rate of the parameter `name`: a head's own rate, layer-wise decay."""
        return 1.0

    def counts(self, batch: Batch) -> Counts:
        """What losses are divided by, of these rows; summed over all rows of the step before any loss."""
        return {"rows": batch.valid.sum()}

    def order(self, batch: Batch) -> Tensor:
        """Indices, int64 on the CPU: the order in which rows are cut into micro-batches. Texts of about the same
        length come together, so that little is padded."""
        return torch.argsort(batch.text_len, stable=True)

    def prepared(self, batch: Batch, step: int) -> Batch:
        """Called once a step with all rows of a worker, in whole slices, before the cut into micro-batches. A task that
        mixes a row with others of its slice does it here. Not called in evaluation."""
        return batch

    def taught_share(self, step: int) -> float:
        """How much of the targets of a step the average of the weights gives; 0: no teacher is asked."""
        return 0.0

    def teach(self, batch: Batch) -> Any:
        """What the averaged weights, which are in their place now, say of these rows: columns that `losses` gets with
        the others."""
        raise NotImplementedError

    def losses(self, batch: Batch, totals: Any, step: int) -> Losses:
        """The terms of these rows. `totals` holds the sums of `counts` over the whole step."""
        raise NotImplementedError

    def metrics(self, sums: Counts, totals: Any) -> dict[str, Tensor]:
        """Figures of the step from the global sums; terms, loss and masked rows are reported anyway."""
        return {}

    def chance(self, global_batch: int) -> dict[str, float]:
        """What a model that knows nothing costs, by term, in steps of `global_batch` rows; terms of which that cannot
        be said are left out."""
        return {}

    def warning(self, figures: dict[str, float], num_rows: int) -> str:
        """What a person should know about a step of `num_rows` rows with these figures, "" if nothing."""
        if figures["masked_rows"] >= num_rows:
            return f"all {num_rows:,} rows are masked, so nothing is trained; masked/ in the run says why"
        return ""

    def without_losses(self, batch: Batch) -> Batch:
        """The same rows, none of which counts; for passes that only keep the workers in step."""
        return batch.without_valid()

    def passes(self) -> list[Pass]:
        """The forward passes of one row, whose graphs are kept at the same time."""
        raise NotImplementedError

    def flops_per_row(self) -> float:
        """Floating point operations of forward and backward, the backward counted as twice the forward."""
        return 3.0 * self._forward(self.passes())

    def repeated_flops_per_row(self) -> float:
        """What several micro-batches add: the forward of the `repeated` passes."""
        return self._forward(self.passes()[: self.repeated])

    def taught_passes(self) -> list[Pass]:
        """The passes of a teacher over one row, of which no graph is kept."""
        return []

    def taught_flops_per_row(self) -> float:
        """What a teacher adds: the forward of its passes."""
        return self._forward(self.taught_passes())

    def _forward(self, passes: list[Pass]) -> float:
        config = self.model.config
        kept = self.kept_patches
        return sum(p.times * pass_flops(config, p.text_len, p.image, p.num_layers, kept) for p in passes)

    def traffic(self, global_batch: int, workers: int) -> dict[str, float]:
        """Bytes that a worker receives in a step from collectives of the task's own, by term."""
        return {}

    def head_bytes_per_row(self) -> float:
        """What the backward of the heads keeps of one row, where it matters: logits over a vocabulary."""
        return 0.0

    def evaluation(self, schema: Schema) -> Evaluation:
        """How this task is measured on data of this schema."""
        raise NotImplementedError

    def noise(self, name: str, position: Tensor, step: int) -> rng.Noise | None:
        """The drop path and dropout draws of the pass `name` for the rows at `position`; None without either."""
        if self.model.config.drop_path == 0:
            return None
        return rng.Noise(self.seed, step, name, position)

    def init_linear(self, name: str, linear: nn.Linear) -> None:
        """Starts a layer of the task's own as the model's are: a truncated normal from the seed, and 0."""
        generator = torch.Generator().manual_seed(rng.stream(self.seed, f"init/task.{name}") >> 1)
        std = self.model.config.init_std
        with torch.no_grad():
            values = torch.empty(linear.weight.shape)
            nn.init.trunc_normal_(values, std=std, generator=generator)
            linear.weight.copy_(values)
            linear.bias.zero_()


class Encoded(Protocol):
    features: Tensor  # [b, ...]: what the rest of the global batch must know of these rows


class Lesson(Protocol):
    """What a teacher says of some rows."""

    features: Tensor  # as those of `Encoded`


class GlobalPlan(Protocol):
    """What the global batch means for some local rows."""

    def rows(self, wanted: slice | Tensor) -> GlobalPlan: ...

    def without_losses(self) -> GlobalPlan:
        """The same passes, nothing of which counts."""
        ...


class GlobalTask(Task):
    """A task whose losses depend on the whole global batch. `train/step.py` puts its parts in order."""

    def teach(self, batch: Batch) -> Lesson:  # type: ignore[override]
        raise NotImplementedError

    def encode(self, batch: Batch, step: int, lesson: Lesson | None = None) -> Encoded:
        """The passes over single rows; with several micro-batches it is called twice for each. It keeps the lesson on
        these rows for `losses`."""
        raise NotImplementedError

    def plan(
        self, batch: Batch, features: Tensor, workers: Workers, step: int, taught: Tensor | None = None
    ) -> tuple[GlobalPlan, Any]:
        """(plan of this worker's rows, totals of the step). All collectives of the task are here. `taught` are the
        features of all rows of this worker by the teacher."""
        raise NotImplementedError

    def losses(self, batch: Batch, encoded: Any, plan: Any, totals: Any, step: int) -> Losses:  # type: ignore[override]
        """The terms of a micro-batch."""
        raise NotImplementedError

    def closing(self, totals: Any) -> Losses:
        """What is added once per worker and step, in its last backward; the keys are those of `losses`."""
        raise NotImplementedError


def given(value: T | None) -> T:
    """`value`, which the caller knows to be there: a head of this model, an output that was asked for."""
    assert value is not None
    return value


def layer_rate(name: str, depth: int, decay: float) -> float:
    """`decay` to the power of the number of layers above the parameter `name`, as BEiT fine-tunes.

    1 for the norm at the top, `decay` for the last layer, `decay ** (depth + 1)` for the embeddings.
    """
    if name.startswith("model.norm"):
        return 1.0
    _, inside, rest = name.partition("model.layers.")
    return decay ** (depth - int(rest.split(".")[0]) if inside else depth + 1)


def texts_of(option: str, value: Any) -> tuple[str, ...]:
    """The texts of an option of an evaluation. Raises UserError for anything but a list of them."""
    is_list = isinstance(value, Collection) and not isinstance(value, str)
    if not (is_list and all(isinstance(text, str) for text in value)):
        raise UserError(f'{option}={value!r} is not a list of texts; write for example {option}=["a","b"]')
    return tuple(value)


def in_pair_pass(name: str, config: ModelConfig) -> bool:
    """Whether a fused pair passes through the parameter `name`: not the heads but the pooler, and in the top layers
    only the vision-language experts."""
    if not name.startswith("model.") or name.removeprefix("model.").split(".")[0] in HEADS:
        return False
    _, inside, rest = name.partition("model.layers.")
    layer, *parts = rest.split(".")
    return not (inside and int(layer) >= config.vl_start and parts[0] == "experts" and parts[1] in ("text", "image"))


def in_image_pass(name: str) -> bool:
    """Whether an image alone passes through the parameter `name` of the model."""
    other = ("text_embed", "text_attention", "experts.text", "experts.vl", "pooler", *HEADS)
    return not any(f".{part}." in name for part in other)


def pooled(
    model: VLMo, batch: Batch, noise: rng.Noise | None = None, image: Tensor | None = None, image_slot: int = 1
) -> Tensor:
    """The pooled [T_CLS] [B,D] of the pairs of a batch; `image` uint8 `[B,3,H,W]` replaces the column of that name."""
    shown = pixels(model, batch.image if image is None else image)
    ids, mask = batch.text_ids, batch.text_mask
    pair = model.encode(image=shown, text=ids, text_mask=mask, read=1, noise=noise, image_slot=image_slot)
    return given(model.pooler)(given(pair.text)[:, 0])


def by_row(values: Tensor, chosen: Tensor) -> Tensor:
    """The sums [B] of values [M] that belong to the chosen places of `chosen` bool [B, ...], in their order."""
    sums = torch.zeros(len(chosen), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, chosen.nonzero()[:, 0], values.double())


def share(values: np.ndarray, chance: float | None = None) -> Score:
    """The mean of bools, or of numbers from 0 to 1."""
    return Score(float(values.mean(dtype=np.float64)), chance, len(values))


def joined(blocks: Iterable[Columns]) -> Columns:
    """All blocks as one; for scores that need all rows at once."""
    together: dict[str, list[np.ndarray]] = {}
    for block in blocks:
        for name, values in block.items():
            together.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in together.items()}


def pixels(model: VLMo, image: Tensor) -> Tensor:
    """uint8 to [-1, 1], the mean and deviation of 0.5 that BEiT was trained with."""
    return image.to(model.dtype) / 127.5 - 1.0


def image_states(model: VLMo, image: Tensor, noise: rng.Noise | None = None, read: int | None = None) -> Tensor:
    """uint8 [B,3,H,W] -> the image encoder's states [B,P,D], CLS first; the first `read` of them."""
    return given(model.encode(image=pixels(model, image), read=read, noise=noise).image)
