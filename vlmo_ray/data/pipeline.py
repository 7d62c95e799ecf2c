"""A worker's own small Ray Data pipeline: from the steps it has to do to its batches, in order.

The order of rows is computed here, without Ray. What Ray Data does is to run the reading and decoding in other
processes of the worker's node, under the CPUs that are reserved for the worker. (Tasks that asked for CPUs of their own
would wait for ever where training workers have taken all; and of what is left over Ray Data 2.60 gives each pipeline
its part by integer division, node by node: with many workers, nothing.)

The work is cut into groups (of steps, see `order`), a group into parts (of neighbouring slices), and a part is one
block. A dataset is built for a window of some groups at a time, so nothing grows with the size of the data set or the
length of the run. A thread is one whole window ahead of the training, so that the start of a window costs it nothing.

A window is read to its end as fast as it comes, and never left waiting for the training: as soon as finished blocks
wait to be taken, Ray Data's executor (2.60) polls without a pause, in a thread of this process, and takes its core
and its interpreter lock from the training.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from vlmo_ray.config import DataConfig
from vlmo_ray.data.manifest import Manifest
from vlmo_ray.data.order import Order, Rows, Schedule, deal
from vlmo_ray.data.parts import Columns, EvalReader, Part, TrainReader, make_part
from vlmo_ray.data.prefetch import Prefetch
from vlmo_ray.data.read import ShardError

if TYPE_CHECKING:  # both are slow to import, and a data task needs neither
    import ray.data

    from vlmo_ray.data.batch import PairBatch

PART_ROWS = 512  # a block costs Ray Data 25 ms, and a part reads about one chunk that it shares with the next
WINDOW_ROWS = 4096  # of a worker; a window's start and end cost about half a second of data time
WINDOW_BYTES = 256 << 20  # of decoded rows, unless one group has more


@dataclass(frozen=True)
class _Group:
    steps: range
    parts: list[Part]


@dataclass(frozen=True)
class _Reporting:
    """Sends a `ShardError` as a block. As an exception it would arrive inside Ray's, with advice added to
    its sentence, after Ray had printed two tracebacks, and before the batches that come ahead of it."""

    reader: TrainReader

    def __call__(self, part: Part) -> Columns:
        try:
            return self.reader(part)
        except ShardError as error:
            return self.reader.failure(str(error))


class PairStream:
    """The batches of one worker for the steps `[start, stop)`: iterate, or use as a context manager.

    Each item is the `PairBatch` of the rows of the worker's slices, in the order of positions; a worker
    without slices gets batches of no rows. `num_workers` and `rank` change which rows come here, and nothing
    about a row. `tasks` read and decode at once. `in_process` does the same work without Ray, in the calling process.

    The decoded rows of up to three windows are in memory at once: the one being trained on, the next, and the one
    being read. A window has at least one group of steps: a run whose batches are too large for that sets
    `data.group_steps` to 1.

    A stream can be iterated once. Raises `ShardError` when a chunk cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        *,
        image_size: int,
        max_text_len: int,
        vocab_size: int,
        seed: int,
        schedule: Schedule,
        start: int,
        stop: int,
        rank: int = 0,
        num_workers: int = 1,
        parts_per_group: int | None = None,  # None: parts of about PART_ROWS rows
        window_groups: int | None = None,  # None: up to WINDOW_ROWS rows and WINDOW_BYTES
        tasks: int = 1,
        in_process: bool = False,
    ):
        assert 0 <= start <= stop <= schedule.total_steps and tasks > 0
        self._manifest = manifest
        self._reader = TrainReader(manifest.uri, data, image_size, max_text_len, vocab_size, seed)
        self._order = Order(manifest.chunk_rows, seed, schedule, data.group_steps)
        self._steps, self._rank, self._num_workers = range(start, stop), rank, num_workers
        self._parts_per_group, self._window_groups = parts_per_group, window_groups
        self._tasks, self._in_process = tasks, in_process
        self._ahead: Prefetch | None = None
        self._open: Iterator[PairBatch] | None = None

    def __iter__(self) -> Iterator[PairBatch]:
        assert self._open is None, "a stream is iterated once: make another"
        if self._in_process:
            self._open = self._batches(self._windows())
        else:
            self._ahead = Prefetch(map(_read_whole, self._windows()), 1)
            self._open = self._batches(self._ahead)
        return self._open

    def close(self) -> None:
        """End the data tasks and the thread; also done at the end of a `with` block."""
        if self._open is not None:
            self._open.close()
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> PairStream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _windows(self) -> Iterator[tuple[list[_Group], Iterator[Columns]]]:
        """Groups, with the blocks of all their parts in order; one group at first, to start soon, then ever more."""
        groups, count = self._groups(), 1
        while window := list(islice(groups, self._window_groups or count)):
            yield window, self._run([part for group in window for part in group.parts])
            rows = max(1, sum(len(part) for part in window[-1].parts))
            count = max(1, min(2 * count, WINDOW_ROWS // rows, WINDOW_BYTES // (rows * self._row_bytes)))

    def _batches(self, windows: Iterable[tuple[list[_Group], Iterator[Columns]]]) -> Iterator[PairBatch]:
        from vlmo_ray.data.batch import PairBatch

        for window, blocks in windows:
            for group in window:
                for columns in _by_step(group, blocks):
                    if columns is None:
                        yield PairBatch.empty(self._reader.image_size, self._reader.max_text_len)
                    else:
                        yield PairBatch.from_numpy(columns)

    def _groups(self) -> Iterator[_Group]:
        step, stop = self._steps.start, self._steps.stop
        while step < stop:
            group = self._order.group(step)
            first, last = self._slices(step)
            count = self._num_parts(step)
            parts = []
            for i in range(count):
                a, b = deal(last - first, count, i)
                rows = self._order.part_rows(group, first + a, first + b, step, stop)
                if len(rows):
                    parts.append(make_part(self._manifest, rows))
            yield _Group(range(step, min(group.stop, stop)), parts)
            step = group.stop

    def _slices(self, step: int) -> tuple[int, int]:
        return deal(self._order.schedule.num_slices(step), self._num_workers, self._rank)

    def _num_rows(self, step: int) -> int:
        first, last = self._slices(step)
        return (last - first) * self._order.schedule.slice_size

    def _num_parts(self, step: int) -> int:
        """Of the group that `step` is in."""
        first, last = self._slices(step)
        rows = self._num_rows(step) * len(self._order.group(step))
        return max(1, min(last - first, self._parts_per_group or round(rows / PART_ROWS)))

    @property
    def _row_bytes(self) -> int:
        return 3 * self._reader.image_size**2 + 32 * self._reader.max_text_len

    def _run(self, parts: list[Part]) -> Iterator[Columns]:
        """The columns of the parts, in order; of a large part maybe in several pieces."""
        if not parts:
            return
        if self._in_process:
            for part in parts:
                yield self._reader(part)
            return
        import ray
        import ray.data

        dataset = _dataset(
            parts,
            _Reporting(self._reader),
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(self._tasks, len(parts))),
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            # a node about to go takes no tasks any more, and its worker needs data until it has saved
            fallback_strategy=[{"label_selector": {}}],
        )
        # Ray Data takes all of the object store for its own unless told. This is for all of the window, as it is read
        # whole, and as much again for blocks under way.
        limits = dataset.context.execution_options.resource_limits
        dataset.context.execution_options.resource_limits = limits.copy(
            object_store_memory=(256 << 20) + 2 * sum(len(part) for part in parts) * self._row_bytes
        )
        with closing(iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))) as blocks:
            for columns in blocks:
                if columns["step"][0] < 0:
                    raise ShardError(columns["problem"][0])
                yield columns


def _read_whole(window: tuple[list[_Group], Iterator[Columns]]) -> tuple[list[_Group], Iterator[Columns]]:
    """The window with its blocks in memory. A shard's error stays behind the blocks that were read before it."""
    groups, blocks = window
    read, problem = [], None
    try:
        read.extend(blocks)
    except ShardError as error:
        problem = error

    def replay() -> Iterator[Columns]:
        while read:
            yield read.pop(0)  # and let go
        if problem is not None:
            raise problem

    return groups, replay()


def _by_step(group: _Group, blocks: Iterator[Columns]) -> Iterator[Columns | None]:
    """The columns of each step of a group, from the blocks of its parts; None where there are no rows.

    The rows of a part are in the order of (step, position) and the positions of parts ascend within a step,
    so the rows of a step are one range of each block.
    """
    missing = sum(len(part) for part in group.parts)
    pieces: list[Columns] = []
    while missing:
        pieces.append(next(blocks))
        missing -= len(pieces[-1]["step"])
        assert missing >= 0, "a block has rows of two groups"
    for step in group.steps:
        ranges = [np.searchsorted(piece["step"], [step, step + 1]) for piece in pieces]
        chosen = [(piece, a, b) for piece, (a, b) in zip(pieces, ranges, strict=True) if b > a]
        if not chosen:
            yield None
            continue
        # always a copy: the blocks are read-only, and a view of a few rows would keep all of a block alive
        columns = {name: np.concatenate([piece[name][a:b] for piece, a, b in chosen]) for name in pieces[0]}
        assert np.all(np.diff(columns["position"]) > 0)
        yield columns


def eval_dataset(
    manifest: Manifest,
    *,
    image_size: int,
    max_text_len: int,
    chunks: Iterable[int] | None = None,
    cpus_per_task: float = 1.0,
) -> ray.data.Dataset:
    """All rows once, in the order of the manifest, one block per chunk, without augmentation or masking.

    Columns: image uint8 `[3, H, W]`, text_ids int32 `[T]`, text_mask bool `[T]`, valid bool, id, image_id,
    text, problem str (see `parts.EvalReader`), and chunk, row int64, where the row is stored. A chunk that
    cannot be read raises inside Ray's exceptions: `prefetch.user_error` finds the sentence.
    """
    chosen = np.arange(manifest.num_chunks) if chunks is None else np.fromiter(chunks, dtype=np.int64)
    parts = []
    for chunk in chosen.tolist():
        row = np.arange(manifest.chunk_rows[chunk], dtype=np.int64)
        place = np.full_like(row, chunk)
        parts.append(make_part(manifest, Rows(step=place, position=row, epoch=place, chunk=place, row=row)))
    return _dataset(parts, EvalReader(manifest.uri, image_size, max_text_len), num_cpus=cpus_per_task)


def _dataset(parts: list[Part], reader, **options) -> ray.data.Dataset:
    import ray.data

    for name in ("execution.streaming_executor", "logging", "progress"):  # they would report every window
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)

    def read(block: Columns) -> Columns:
        columns = [reader(pickle.loads(part)) for part in block["part"]]
        assert len(columns) == 1, "one part per block"
        return columns[0]

    items = [{"part": pickle.dumps(part)} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read,
        batch_size=None,
        batch_format="numpy",
        **options,
    )
    context = dataset.context  # this dataset's own copy
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # or else the sentence of a `UserError` is lost on the way
    return dataset
