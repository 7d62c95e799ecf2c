"""Several data sets in one run: a fixed number of slices of every batch comes from each.

Each data set has an `Order` of its own, over the schedule of its own slices. So a run sees each exactly once per epoch
of that data set, however long the others are, and its place in each follows from the step alone.

    weights 2 and 1, batches of 6 slices: 4 slices of A and 2 of B, spread evenly: A B A A B A
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from vlmo_ray.data.order import Order, Rows, Schedule
from vlmo_ray.errors import UserError


def shares(num_slices: int, weights: Sequence[float]) -> list[int]:
    """How many of `num_slices` slices each data set gets: by largest remainder, at least one each."""
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"the weights {list(weights)} must all be above 0 and finite; leave a data set out instead")
    if len(weights) > num_slices:
        raise UserError(
            f"{len(weights)} data sets do not fit into the {num_slices} slices of a batch; lower slice_size"
        )
    exact = np.asarray(weights, float) / sum(weights) * num_slices
    out = np.maximum(np.floor(exact), 1).astype(int)
    while out.sum() != num_slices:
        missing = np.sign(num_slices - out.sum())
        allowed = np.where((out > 1) | (missing > 0), missing * (exact - out), -np.inf)
        out[int(np.argmax(allowed))] += missing
    return out.tolist()


def pattern(counts: Sequence[int]) -> np.ndarray:
    """The data set of each slice of a batch, int `[sum(counts)]`: the slices of each are evenly spread."""
    source = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return source[np.lexsort((source, place))]


class Mix:
    """The rows of every batch of several data sets, with the methods of `Order`; chunks are numbered as in `Sources`.

    Args:
        chunk_rows: of each data set the rows of its chunks, int `[C]`.
        weights: of each data set, the share of a batch that it gets, up to whole slices.
        seed, schedule, shuffle_steps: as for `Order`.
    """

    def __init__(
        self,
        chunk_rows: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        schedule: Schedule,
        shuffle_steps: int,
    ):
        if len(weights) != len(chunk_rows):
            raise UserError(f"{len(chunk_rows)} data sets have {len(weights)} weights; give one each")
        self.schedule = schedule
        size = schedule.slice_size
        counts = [shares(batch // size, weights) for _, batch in schedule.phases]
        self._patterns = {sum(count): pattern(count) for count in counts}
        self._first_chunk = np.cumsum([0, *map(len, chunk_rows)])
        self._orders = []
        for k, rows in enumerate(chunk_rows):
            phases = zip(schedule.phases, counts, strict=True)
            own = Schedule(tuple((steps, count[k] * size) for (steps, _), count in phases), size)
            self._orders.append(Order(rows, seed, own, shuffle_steps))

    @cached_property
    def num_rows(self) -> int:
        return sum(order.num_rows for order in self._orders)

    def span(self, step: int) -> range:
        """The steps whose rows are shuffled together with those of `step`: the same in every data set."""
        return self._orders[0].span(step)

    def slice_rows(
        self, span: range, first_slice: int, last_slice: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """The rows of slices `[first_slice, last_slice)` in the steps of `span` that are in `[start, stop)`."""
        source = self._patterns[self.schedule.num_slices(span.start)]
        size = self.schedule.slice_size
        pieces = []
        for k, order in enumerate(self._orders):
            slices = np.flatnonzero(source == k)  # where its own slices are in the batch
            first, last = np.searchsorted(slices, [first_slice, last_slice])
            rows = order.slice_rows(span, int(first), int(last), start, stop)
            position = slices[rows.position // size] * size + rows.position % size
            pieces.append(Rows(rows.step, position, rows.epoch, rows.chunk + self._first_chunk[k], rows.row))
        together = Rows.concatenate(pieces)
        return together.take(np.lexsort((together.position, together.step)))
