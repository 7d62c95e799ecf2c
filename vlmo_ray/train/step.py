"""One step: gradients of the global loss, exact for any split into workers and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmo_ray.data.batch import Batch
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.tasks.task import GlobalTask, Losses, weighted
from vlmo_ray.train.optim import WeightAverage
from vlmo_ray.train.parallel import Parallel

_FIRST = slice(0, 1)


def gradients(
    parallel: Parallel,
    batch: Batch,
    workers: Workers,
    step: int,
    micro_batch: int,
    bf16: bool = False,
    average: WeightAverage | None = None,
) -> dict[str, Tensor]:
    """Leaves d(total loss)/d(parameter) in `.grad`, and returns this step's global figures (0-d tensors).

    batch: all rows of this worker, at least one. Figures: loss, every term, the task's metrics, masked_rows. `average`
    is the teacher of tasks that have one.
    """
    assert len(batch), "a worker without rows"
    task = parallel.task
    batch = task.prepared(batch, step)
    spans = parallel.micro_batches(workers.counts, workers.rank, micro_batch)
    if len(spans) > 1:
        order = task.order(batch)
        spans = [None if span is None else order[span] for span in spans]
    # an empty micro-batch is the worker's first row with all its losses left out
    micros = [batch.rows(_FIRST if span is None else span).trimmed() for span in spans]

    def precision() -> torch.autocast:
        return torch.autocast(batch.valid.device.type, torch.bfloat16, enabled=bf16)

    lessons: list[Any] = [None] * len(micros)
    if task.taught_share(step):
        assert average is not None, "the task's config has refused to go without one"
        average.swap()  # before any graph, which would miss the weights that it was made with
        with precision():
            lessons = [parallel.evaluate(task.teach, micro) for micro in micros]
        average.swap()

    if isinstance(task, GlobalTask):
        closing, totals, given = _look_ahead(parallel, batch, micros, spans, lessons, workers, step, precision)
    else:
        local = task.counts(batch)
        summed = workers.sum(torch.stack([count.to(torch.float64) for count in local.values()]))
        totals = dict(zip(local, summed, strict=True))
        closing, given = None, lambda index: (totals,)
        micros = [m if lesson is None else m.with_columns(**lesson) for m, lesson in zip(micros, lessons, strict=True)]

    sums: Counter[str] = Counter()
    losses = Losses({})
    for i, (micro, span) in enumerate(zip(micros, spans, strict=True)):
        last = i == len(spans) - 1
        with parallel.backward(last):
            with precision():
                rows = task.without_losses(micro) if span is None else micro
                losses = parallel.losses(rows, *given(i), step)
            if last and closing is not None:
                losses = losses + closing()
            # each term is already divided by its count in the whole step
            (losses.total() * (workers.size if parallel.averages else 1)).backward()
        sums.update({f"term/{name}": term.reported.double() for name, term in losses.terms.items()})
        sums.update(losses.sums)

    everything = {**sums, "valid": batch.valid.sum()}
    summed = workers.sum(torch.stack([value.to(torch.float64) for value in everything.values()]))
    figures = dict(zip(everything, summed, strict=True))
    terms = {name: figures.pop(f"term/{name}") for name in losses.terms}
    masked = sum(workers.counts) - figures.pop("valid")
    total = weighted(terms, losses.weights)
    return {"loss": total, **terms, **task.metrics(figures, totals), "masked_rows": masked}


def _look_ahead(
    parallel: Parallel,
    batch: Batch,
    micros: list[Batch],
    spans: Sequence[slice | Tensor | None],
    lessons: list[Any],
    workers: Workers,
    step: int,
    precision: Callable[[], torch.autocast],
) -> tuple[Callable[[], Losses], Any, Callable[[int], tuple]]:
    """(closing losses, totals, what `losses` is given for micro-batch i) of a task over the whole global batch.

    With one micro-batch nothing is computed twice. With several, the rows are first encoded without a graph, for
    what depends on the whole batch, and again micro-batch by micro-batch (Gao et al. 2021, "Scaling deep
    contrastive learning batch size under memory limited setup"). Every draw is stateless, so the second encoding
    equals the first.
    """
    task = parallel.task
    assert isinstance(task, GlobalTask)
    single = len(micros) == 1
    with precision(), torch.set_grad_enabled(single):
        encoded = [parallel.encode(micro, step, lesson) for micro, lesson in zip(micros, lessons, strict=True)]
    features = _joined(batch, [some.features.detach() for some in encoded], spans)
    taught = None if lessons[0] is None else _joined(batch, [lesson.features for lesson in lessons], spans)
    if not single:
        encoded.clear()
    plan, totals = task.plan(batch, features, workers, step, taught)

    def given(i: int) -> tuple:
        span = spans[i]
        again = encoded[0] if single else parallel.encode(micros[i], step, lessons[i])
        needs = plan.rows(_FIRST).without_losses() if span is None else plan.rows(span)
        return again, needs, totals

    return lambda: task.closing(totals), totals, given


def _joined(batch: Batch, parts: list[Tensor], spans: Sequence[slice | Tensor | None]) -> Tensor:
    """The rows of all micro-batches, in the order of `batch`."""
    out = parts[0].new_empty((len(batch), *parts[0].shape[1:]))
    for part, span in zip(parts, spans, strict=True):
        if span is not None:
            out[span if isinstance(span, slice) else span.to(out.device)] = part
    return out
