"""A worker's own small Ray Data pipeline: from the steps it has to do to its batches, in order.

The order of rows is computed here, without Ray. What Ray Data does is to run the reading and decoding in other
processes of the worker's node, under the CPUs that are reserved for the worker. (Tasks that asked for CPUs of their own
would wait for ever where training workers have taken all; and of what is left over Ray Data 2.60 gives each pipeline
its part by integer division, node by node: with many workers, nothing.)

A dataset is built for a window of some spans of steps (see `order`) at a time, so nothing grows with the size of the
data set or the length of the run. The rows of a window are cut into parts at the ends of chunks, so that a window reads
a chunk once (a chunk of very many rows a few times). A part is one block, and the rows of a step come out of the blocks
that have some of them.

A window is read to its end as fast as it comes, by a thread, and never left waiting for the training: as soon as
finished blocks wait to be taken, Ray Data's executor (2.60) polls without a pause, in a thread of this process, and
takes its core and its interpreter lock from the training. The next window starts while the last tasks of this one
run, until two are waiting for the training.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlmo_ray.data.order import Rows, Schedule, deal
from vlmo_ray.data.prefetch import Overlapped
from vlmo_ray.data.read import ShardError
from vlmo_ray.data.reader import Columns, Part, Reader, Sources, make_part, whole_chunk

if TYPE_CHECKING:  # both are slow to import, and a data task needs neither
    import ray.data

    from vlmo_ray.data.batch import Batch

PART_ROWS = 128, 512  # at least and at most, about; a block costs Ray Data 25 ms
WINDOW_ROWS = 4096  # of a worker, and so much more for each 8 tasks more
WINDOW_BYTES = 384 << 20  # of decoded rows, and so much more for each 4 tasks more; but always one span

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's `mallopt`


class RowOrder(Protocol):
    """An `Order`, or a `Mix` of several."""

    @property
    def schedule(self) -> Schedule: ...

    def span(self, step: int) -> range: ...

    def slice_rows(
        self, span: range, first_slice: int, last_slice: int, start: int = 0, stop: int | None = None
    ) -> Rows: ...


@dataclass(frozen=True)
class Window:
    """What is read by one dataset."""

    steps: range
    parts: list[Part]  # in the order of their first steps


@dataclass(frozen=True)
class _Reporting:
    """Sends a `ShardError` as a block. As an exception it would arrive inside Ray's, with advice added to
    its sentence, after Ray had printed two tracebacks, and before the batches that come ahead of it."""

    reader: Reader

    def __call__(self, part: Part) -> Columns:
        try:
            return self.reader(part)
        except ShardError as error:
            return self.reader.failure(str(error))


class Stream:
    """The batches of one worker for the steps `[start, stop)`: iterate, or use as a context manager.

    Each item is the `Batch` of the rows of the worker's slices, in the order of positions; a worker
    without slices gets batches of no rows. `num_workers` and `rank` change which rows come here, and nothing
    about a row. `tasks` read and decode at once, and for a moment more where a window follows another.
    `in_process` does the same work without Ray, in the calling process.

    The decoded rows of up to three windows are in memory at once: the one being trained on and the next two. A window
    has at least one span of steps: a run whose batches are too large for that sets `data.shuffle_steps` to 1.

    A stream can be iterated once. Raises `ShardError` when a chunk cannot be read.
    """

    def __init__(
        self,
        sources: Sources,
        reader: Reader,
        order: RowOrder,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        num_workers: int = 1,
        part_rows: int | None = None,  # None: two parts a task and window, within PART_ROWS
        window_spans: int | None = None,  # None: up to WINDOW_ROWS rows and WINDOW_BYTES
        tasks: int = 1,
        in_process: bool = False,
    ):
        assert 0 <= start <= stop <= order.schedule.total_steps and tasks > 0
        self._sources, self._reader, self._order = sources, reader, order
        self._steps, self._rank, self._num_workers = range(start, stop), rank, num_workers
        self._part_rows, self._window_spans = part_rows, window_spans
        self._tasks, self._in_process = tasks, in_process
        self._windows = self.windows()
        self._ahead = Overlapped(self._read)
        self._open: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        assert self._open is None, "a stream is iterated once: make another"
        self._open = self._batches()
        return self._open

    def close(self) -> None:
        """End the data tasks and the threads; also done at the end of a `with` block."""
        if self._open is not None:
            self._open.close()
        self._ahead.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def windows(self) -> Iterator[Window]:
        """How the steps are cut: one span at first, to start soon, then ever more."""
        step, stop, count = self._steps.start, self._steps.stop, self._window_spans or 1
        by_rows = WINDOW_ROWS * max(1, self._tasks / 8)
        by_bytes = WINDOW_BYTES * max(1, self._tasks / 4) / self._reader.row_bytes
        most = math.inf if self._window_spans else min(by_rows, by_bytes)
        while step < stop:
            begin, spans, total = step, [], 0
            while step < stop and len(spans) < count:
                span = self._order.span(step)
                first, last = self._slices(step)
                end = min(span.stop, stop)
                total += (last - first) * self._order.schedule.slice_size * (end - step)
                if spans and total > most:
                    break
                spans.append(self._order.slice_rows(span, first, last, step, end))
                step = end
            yield Window(range(begin, step), self._cut_parts(Rows.concatenate(spans)))
            count = self._window_spans or 2 * len(spans)

    def _batches(self) -> Iterator[Batch]:
        from vlmo_ray.data.batch import Batch

        while True:
            blocks = self._read(lambda: None) if self._in_process else self._ahead.next()
            window = next(blocks)
            if window is None:
                return
            for step, pieces in _by_step(window, blocks):
                first, last = self._slices(step)
                if first == last:
                    batch = Batch.empty(self._reader.encoder.columns)
                else:
                    size = self._order.schedule.slice_size
                    batch = Batch.from_numpy(_together(pieces, range(first * size, last * size)))
                del pieces  # they keep blocks in memory
                yield batch

    def _read(self, nearly_done: Callable[[], None]) -> Iterator[Window | Columns | None]:
        """The next window, then its blocks; None after the last window. Tells when only its last tasks are running."""
        window = next(self._windows, None)
        if window is None:
            yield None
            return
        missing = sum(map(len, window.parts))
        last = sum(map(len, window.parts[-self._tasks :]))
        if missing <= last:
            nearly_done()
        yield window
        for block in self._run(window.parts):
            before, missing = missing, missing - len(block["step"])
            if before > last >= missing:
                nearly_done()
            yield block

    def _cut_parts(self, rows: Rows) -> list[Part]:
        """Parts of about equal size: a chunk's rows are in one of them, unless they are far more than such a part."""
        least, most = PART_ROWS
        wanted = self._part_rows or min(most, max(least, len(rows) / (2 * self._tasks)))
        # chunk after chunk as they come to be needed, and in a chunk step after step
        _, first, chunk = np.unique(rows.chunk, return_index=True, return_inverse=True)
        order = np.argsort(first[chunk], kind="stable")
        sizes = np.bincount(chunk)[np.argsort(first)]
        cuts, end = [0], 0
        for size in sizes.tolist():
            pieces = math.ceil(size / min(2 * wanted, max(wanted, most)))
            for begin, stop in (deal(size, pieces, piece) for piece in range(pieces)):
                if end + (stop - begin) / 2 - cuts[-1] > wanted:  # nearer to what is wanted without this piece
                    cuts.append(end)
                end += stop - begin
        chosen = [np.sort(part) for part in np.split(order, cuts[1:]) if len(part)]
        parts = [make_part(self._sources, rows.take(index)) for index in chosen]
        return sorted(parts, key=lambda part: part.step[0])

    def _slices(self, step: int) -> tuple[int, int]:
        return deal(self._order.schedule.num_slices(step), self._num_workers, self._rank)

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
            object_store_memory=(256 << 20) + 2 * sum(len(part) for part in parts) * self._reader.row_bytes
        )
        with closing(iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))) as blocks:
            for columns in blocks:
                if columns["step"][0] < 0:
                    raise ShardError(columns["problem"][0])
                yield columns


def _by_step(window: Window, blocks: Iterator[Columns]) -> Iterator[tuple[int, list[Columns]]]:
    """Each step of the window, with the pieces of blocks that have its rows."""
    pieces: list[Columns] = []
    received = wanted = 0
    parts = iter(window.parts)
    part = next(parts, None)
    for step in window.steps:
        while part is not None and part.step[0] <= step:
            wanted += len(part)
            part = next(parts, None)
        while received < wanted:  # Ray Data may cut a large block in several
            pieces.append(next(blocks))
            received += len(pieces[-1]["step"])
        ranges = [np.searchsorted(piece["step"], [step, step + 1]) for piece in pieces]
        found = [
            {name: column[a:b] for name, column in piece.items()}
            for piece, (a, b) in zip(pieces, ranges, strict=True)
            if b > a
        ]
        pieces = [piece for piece in pieces if piece["step"][-1] > step]
        yield step, found
        del found  # it keeps blocks in memory


def _together(pieces: list[Columns], positions: range) -> Columns:
    """The rows at `positions`, in order: always copies, as blocks are read-only, and would be kept alive by a view."""
    places = [piece["position"] - positions.start for piece in pieces]
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(positions)))
    columns = {}
    for name, column in pieces[0].items():
        kind = np.result_type(*(piece[name] for piece in pieces))
        columns[name] = np.empty((len(positions), *column.shape[1:]), kind)
        for piece, at in zip(pieces, places, strict=True):
            columns[name][at] = piece[name]
    return columns


def eval_dataset(sources: Sources, reader: Reader, cpus_per_task: float = 1.0) -> ray.data.Dataset:
    """All rows once, in the order of the manifests, one block per chunk: the columns that `reader` gives.

    A chunk that cannot be read raises inside Ray's exceptions: `prefetch.user_error` finds the sentence.
    """
    parts = [whole_chunk(sources, index) for index in range(sources.num_chunks)]
    return _dataset(parts, reader, num_cpus=cpus_per_task)


@functools.cache  # once a process
def _keep_freed_memory() -> None:
    """What this process frees, up to about a GiB, it keeps for its next part.

    Else every part's rows are in new pages, and to get those costs some per cent of the CPU time of decoding.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc has it
        libc.mallopt(_M_MMAP_MAX, 0)  # large arrays come from the heap as well
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _dataset(parts: list[Part], reader, **options) -> ray.data.Dataset:
    import ray.data

    for name in ("execution.streaming_executor", "logging", "progress"):  # they would report every window
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)

    def read(block: Columns) -> Columns:
        _keep_freed_memory()
        columns = [reader(pickle.loads(part)) for part in block["part"]]
        assert len(columns) == 1, "one part per block"
        return columns[0]

    items = [{"part": pickle.dumps(part)} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_size=None, batch_format="numpy", **options
    )
    context = dataset.context  # this dataset's own copy
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # or else the sentence of a `UserError` is lost on the way
    return dataset
