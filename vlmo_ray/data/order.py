"""Which row of the data set is at which position of which batch: a pure function of (seed, step).

The rows form one endless stream. Epoch e is the stream positions `[e * T, (e + 1) * T)` of a data set of T rows, and
goes through all chunks in an order of its own. Batch t is the stream positions `[R(t), R(t + 1))`, where R is the
running sum of the batch sizes, so the place in the data is one number, the step.

Within a span of consecutive steps the rows are shuffled: each slice gets a run of neighbouring rows of the epoch's
sequence, spread at random over the span's batches. A worker has a contiguous range of slices, so it reads few chunks
that it uses only in part, and rows that are neighbours in a file are rarely in the same batch. A span never crosses a
phase, as the number of slices changes there. Where a span has rows of two epochs, those of each are shuffled
separately, so that an epoch has every row exactly once.

    batch size 4 = 2 slices of 2, spans of 2 steps, chunks a b c d of 2 rows, in this epoch's order c a d b:
        sequence          c0 c1 a0 a1 | d0 d1 b0 b1
        slice 0, slice 1  <---------> | <--------->
        batch 0             c1   a1   |   d0   b1
        batch 1             a0   c0   |   b0   d1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import overload

import numpy as np

from vlmo_ray import rng
from vlmo_ray.config import Config
from vlmo_ray.errors import UserError


def deal(num_slices: int, num_workers: int, rank: int) -> tuple[int, int]:
    """The slices `[first, last)` of one worker; shares differ by at most one slice and may be empty."""
    assert 0 <= rank < num_workers
    return rank * num_slices // num_workers, (rank + 1) * num_slices // num_workers


@dataclass(frozen=True)
class Schedule:
    """The batch size of every step: phases of (number of steps, global batch), one after the other.

    Raises `UserError` for a phase that is empty or whose batch is not a whole number of slices.
    """

    phases: tuple[tuple[int, int], ...]
    slice_size: int

    def __post_init__(self):
        if self.slice_size < 1:
            raise UserError(f"The slice size is {self.slice_size}: make it at least 1.")
        if not self.phases:
            raise UserError("The schedule has no phase: give at least one (steps, global batch).")
        for steps, batch in self.phases:
            if steps < 1 or batch < 1:
                raise UserError(f"A phase of {steps} steps of batch {batch} is empty: make both at least 1.")
            if batch % self.slice_size:
                raise UserError(
                    f"The global batch {batch} is not a multiple of the slice size {self.slice_size}: "
                    "change one of them."
                )

    @property
    def total_steps(self) -> int:
        return sum(steps for steps, _ in self.phases)

    def phase(self, step: int) -> tuple[range, int]:
        """The steps of the phase that `step` is in, and its global batch."""
        first = 0
        for steps, batch in self.phases:
            if first <= step < first + steps:
                return range(first, first + steps), batch
            first += steps
        raise AssertionError(f"step {step} is not in [0, {first})")

    def batch_size(self, step: int) -> int:
        """G, the global batch of this step."""
        return self.phase(step)[1]

    def num_slices(self, step: int) -> int:
        return self.batch_size(step) // self.slice_size

    @overload
    def rows_before(self, step: int) -> int: ...
    @overload
    def rows_before(self, step: np.ndarray) -> np.ndarray: ...
    def rows_before(self, step: int | np.ndarray) -> int | np.ndarray:
        """R(step), the rows of all steps before it: an int for an int, int64 for an array of steps."""
        steps = np.asarray(step, dtype=np.int64)
        assert np.all((steps >= 0) & (steps <= self.total_steps)), f"{step} is not in [0, {self.total_steps}]"
        rows = np.zeros_like(steps)
        first = 0
        for length, batch in self.phases:
            rows += np.clip(steps - first, 0, length) * batch
            first += length
        return int(rows) if np.ndim(step) == 0 else rows


def schedule_of(config: Config) -> Schedule:
    return Schedule(tuple((p.steps, p.global_batch) for p in config.phases), config.slice_size)


def span(schedule: Schedule, shuffle_steps: int, step: int) -> range:
    """The steps whose rows are shuffled together with those of `step`.

    Only the last span of the last phase may reach beyond the run's last step, so that a run whose last phase is made
    longer later continues exactly where it stopped.
    """
    phase, _ = schedule.phase(step)
    first = step - (step - phase.start) % shuffle_steps
    last = first + shuffle_steps
    is_last_phase = phase.stop == schedule.total_steps
    return range(first, last if is_last_phase else min(last, phase.stop))


@dataclass(frozen=True)
class Rows:
    """Rows of the data set and their places: int64 arrays of equal length, sorted by (step, position)."""

    step: np.ndarray
    position: np.ndarray  # in the global batch of that step
    epoch: np.ndarray
    chunk: np.ndarray
    row: np.ndarray  # in its chunk

    def __len__(self) -> int:
        return len(self.step)

    def take(self, index: np.ndarray) -> Rows:
        return Rows(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def concatenate(cls, pieces: Sequence[Rows]) -> Rows:
        return cls(*(np.concatenate([getattr(piece, f.name) for piece in pieces]) for f in fields(cls)))


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every batch of a run over chunks of `chunk_rows` rows (int `[C]`).

    Any step is reached directly. With 1e9 rows in 4e6 chunks, the first call in an epoch permutes the chunks in less
    than a second; later calls only make their rows.
    """

    chunk_rows: np.ndarray
    seed: int
    schedule: Schedule
    shuffle_steps: int
    _epochs: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.shuffle_steps < 1:
            raise UserError(f"shuffle_steps is {self.shuffle_steps}: make it at least 1.")
        if self.num_rows == 0:
            raise UserError("The data set has no rows: prepare it again.")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_epochs": {}}  # the permutations are large and quick to make again

    @cached_property
    def num_rows(self) -> int:
        return int(np.sum(self.chunk_rows, dtype=np.int64))

    def span(self, step: int) -> range:
        """The steps whose rows are shuffled together with those of `step`."""
        return span(self.schedule, self.shuffle_steps, step)

    def slice_rows(
        self, span: range, first_slice: int, last_slice: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """The rows of slices `[first_slice, last_slice)` in the steps of `span` that are in `[start, stop)`.

        The rows of a slice do not depend on which other slices are asked for.
        """
        assert span == self.span(span.start)
        size, batch = self.schedule.slice_size, self.schedule.batch_size(span.start)
        assert 0 <= first_slice <= last_slice <= batch // size
        begin = self.schedule.rows_before(span.start)
        end = begin + len(span) * batch
        pieces = [
            self._deal_epoch(epoch, span, begin, batch, first_slice * size, last_slice * size)
            for epoch in range(begin // self.num_rows, -(-end // self.num_rows))
        ]
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        step, position = columns[:2]
        keep = np.flatnonzero((step >= start) & (step < (span.stop if stop is None else stop)))
        return Rows(*columns).take(keep[np.lexsort((position[keep], step[keep]))])

    def _deal_epoch(self, epoch: int, span: range, begin: int, batch: int, low: int, high: int) -> tuple:
        """The columns of `Rows` of one epoch for the batch positions `[low, high)` of one span."""
        first_row = epoch * self.num_rows
        # of each step, the range of batch positions that belong to this epoch
        starts = begin + np.arange(len(span), dtype=np.int64) * batch
        lows = np.clip(first_row - starts, 0, batch)
        highs = np.clip(first_row + self.num_rows - starts, 0, batch)
        positions = np.arange(low, high)
        offset, index = np.nonzero((positions >= lows[:, None]) & (positions < highs[:, None]))
        step, position = span.start + offset, positions[index]
        streamed = begin + offset * batch + position
        key = rng.uniforms(rng.stream(self.seed, "rows", epoch), streamed, 1)[:, 0]
        order = np.lexsort((key, position // self.schedule.slice_size))
        # the slices before `low` come first in the sequence
        skipped = np.sum(np.maximum(np.minimum(highs, low) - lows, 0))
        sequence = max(begin - first_row, 0) + skipped + np.arange(len(order))
        chunks, ends = self.epoch(epoch)
        place = np.searchsorted(ends, sequence, side="right")
        chunk = chunks[place]
        row = sequence - (ends[place] - self.chunk_rows[chunk])
        return step[order], position[order], np.full(len(order), epoch), chunk, row

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in the order of this epoch, and the number of rows up to the end of each, int64."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a span rarely touches more than two
                self._epochs.pop(next(iter(self._epochs)))
            generator = np.random.Generator(np.random.Philox(key=rng.stream(self.seed, "chunks", epoch)))
            chunks = generator.permutation(len(self.chunk_rows))
            self._epochs[epoch] = chunks, np.cumsum(self.chunk_rows[chunks], dtype=np.int64)
        return self._epochs[epoch]
