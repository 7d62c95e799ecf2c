"""Which row of the data set is at which position of which batch: a pure function of (seed, step).

The rows form one endless stream. Epoch e owns the stream positions `[e * T, (e + 1) * T)` of a data set of T
rows and goes through all chunks in an order of its own. Batch t is the stream positions `[R(t), R(t + 1))`,
where R is the running sum of the batch sizes, so the place in the data is one number, the step.

Within a span of consecutive steps the rows are dealt out again: each slice gets a run of neighbouring rows
of the epoch's sequence, spread at random over the span's batches. So a worker, which has a contiguous range
of slices, reads few chunks that it does not use, and rows that are neighbours in a file are rarely in the
same batch. A span never crosses a phase (the number of slices would change inside it), and the parts of a
span that belong to different epochs are dealt separately, so that an epoch holds every row exactly once.

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

import numpy as np

from vlmo_ray import rng
from vlmo_ray.errors import UserError


def deal(num_slices: int, num_workers: int, rank: int) -> tuple[int, int]:
    """The slices `[first, last)` of one worker; the shares differ by one slice at most and may be empty."""
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

    def phase(self, step: int) -> range:
        """The steps of the phase that `step` is in."""
        assert 0 <= step < self.total_steps, f"step {step} is not in [0, {self.total_steps})"
        first = 0
        for steps, _ in self.phases:
            if step < first + steps:
                break
            first += steps
        return range(first, first + steps)

    def batch_size(self, step: int) -> int:
        """G, the global batch of this step."""
        assert 0 <= step < self.total_steps, f"step {step} is not in [0, {self.total_steps})"
        ends = np.cumsum([steps for steps, _ in self.phases])
        return self.phases[int(np.searchsorted(ends, step, side="right"))][1]

    def num_slices(self, step: int) -> int:
        return self.batch_size(step) // self.slice_size

    def rows_before(self, step):
        """R(step), the rows drawn by all steps before it: an int for an int, int64 for an array of steps."""
        steps = np.asarray(step, dtype=np.int64)
        assert np.all((steps >= 0) & (steps <= self.total_steps)), f"{step} is not in [0, {self.total_steps}]"
        rows = np.zeros_like(steps)
        first = 0
        for length, batch in self.phases:
            rows += np.clip(steps - first, 0, length) * batch
            first += length
        return int(rows) if np.ndim(step) == 0 else rows


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

    Any step is reached directly: 1e9 rows in 4e6 chunks take under a second the first time in an epoch, for
    the permutation of its chunks, and what the rows themselves take after that.
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
        return {**self.__dict__, "_epochs": {}}  # the permutations are large, and quickly made again

    @cached_property
    def num_rows(self) -> int:
        return int(np.sum(self.chunk_rows, dtype=np.int64))

    def span(self, step: int) -> range:
        """The steps whose rows are shuffled together with those of `step`.

        Only the last span of the last phase may reach beyond the run's last step, so that a run which is
        made longer later goes on exactly where it stopped.
        """
        phase = self.schedule.phase(step)
        first = step - (step - phase.start) % self.shuffle_steps
        last = first + self.shuffle_steps
        is_last_phase = phase.stop == self.schedule.total_steps
        return range(first, last if is_last_phase else min(last, phase.stop))

    def slice_rows(self, span: range, first_slice: int, last_slice: int, start=0, stop=None) -> Rows:
        """The rows of slices `[first_slice, last_slice)` in the steps of `span` that are in `[start, stop)`.

        How slices are put together to parts changes nothing: the rows of a slice are its own.
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
        keep = columns[0] >= start
        if stop is not None:
            keep &= columns[0] < stop
        keep = np.flatnonzero(keep)
        keep = keep[np.lexsort((columns[1][keep], columns[0][keep]))]
        return Rows(*(column[keep] for column in columns))

    def _deal_epoch(self, epoch: int, span: range, begin: int, batch: int, low: int, high: int) -> tuple:
        """The columns of `Rows` for the batch positions `[low, high)` of one span, one epoch's share."""
        first_row = epoch * self.num_rows
        # the batch positions of each step that belong to this epoch, as a range per step
        starts = begin + np.arange(len(span), dtype=np.int64) * batch
        lows = np.clip(first_row - starts, 0, batch)
        highs = np.clip(first_row + self.num_rows - starts, 0, batch)
        step, position = [], []
        for offset, (a, b) in enumerate(zip(np.maximum(lows, low), np.minimum(highs, high), strict=True)):
            positions = np.arange(a, b)
            position.append(positions)
            step.append(np.full(len(positions), span.start + offset))
        step, position = np.concatenate(step), np.concatenate(position)
        streamed = begin + (step - span.start) * batch + position
        key = rng.uniforms(rng.stream(self.seed, "rows", epoch), streamed, 1)[:, 0]
        order = np.lexsort((key, position // self.schedule.slice_size))
        # in slice order, the slices before `low` take their rows of the sequence first
        skipped = np.sum(np.maximum(np.minimum(highs, low) - lows, 0))
        sequence = max(begin - first_row, 0) + skipped + np.arange(len(order))
        chunks, ends = self._epoch(epoch)
        place = np.searchsorted(ends, sequence, side="right")
        chunk = chunks[place]
        row = sequence - (ends[place] - self.chunk_rows[chunk])
        return step[order], position[order], np.full(len(order), epoch), chunk, row

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in the order of this epoch and the number of rows up to the end of each, int64."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a span rarely touches more than two
                self._epochs.pop(next(iter(self._epochs)))
            generator = np.random.Generator(np.random.Philox(key=rng.stream(self.seed, "chunks", epoch)))
            chunks = generator.permutation(len(self.chunk_rows))
            self._epochs[epoch] = chunks, np.cumsum(self.chunk_rows[chunks], dtype=np.int64)
        return self._epochs[epoch]
