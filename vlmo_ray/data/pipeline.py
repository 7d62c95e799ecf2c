"""A worker's own small Ray Data pipeline: from the steps it has to do to its batches, in order.

The order of rows is computed here, without Ray. Ray Data runs the reading and decoding in other processes of the
worker's node, with CPUs that are reserved for the worker. (Tasks that requested CPUs of their own would wait for ever
if training workers had taken them all. Ray Data 2.60 also divides the free CPUs between pipelines by integer division,
node by node: with many workers, each gets none.)

One dataset covers a window, which is a few spans of steps (see `order`), so nothing grows with the size of the data set
or the length of the run. The rows of a window are cut into parts at the ends of chunks, so that a window reads a chunk
once (a chunk of very many rows a few times). A part is one block, and each step takes its rows from the blocks that
have some of them.

A thread reads a window to its end as fast as the blocks come; it never waits for the training. When finished blocks
wait to be taken, Ray Data's executor (2.60) polls without a pause in a thread of this process, and takes its core and
its interpreter lock from the training. The next window starts while the last tasks of this one run, until two
windows are waiting for the training.
"""

from __future__ import annotations

import ctypes
import functools
import math
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlmo_ray.data.mix import Mix
from vlmo_ray.data.order import Order, Rows, deal
from vlmo_ray.data.prefetch import Overlapped
from vlmo_ray.data.read import ShardError
from vlmo_ray.data.reader import Columns, Part, Reader, Sources, make_part, whole_chunk
from vlmo_ray.session import quiet_ray

if TYPE_CHECKING:  # both are slow to import, and a data task needs neither
    import ray.data

    from vlmo_ray.data.batch import Batch

PART_ROWS = 128, 512  # about the least and the most; a block costs Ray Data 25 ms
WINDOW_ROWS = 4096  # of a worker with up to 8 tasks, and in proportion for more
WINDOW_BYTES = 384 << 20  # of decoded rows with up to 4 tasks, and in proportion for more; but always one span

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's `mallopt`


@dataclass(frozen=True)
class Window:
    """What one dataset reads."""

    steps: range
    parts: list[Part]  # in the order of their first steps


@dataclass(eq=False)
class Stream:
    """The batches of one worker for the steps `[start, stop)`: iterate once, or use as a context manager.

    Each item is the `Batch` of the rows of the worker's slices, in the order of positions; a worker without slices gets
    batches of no rows. `num_workers` and `rank` decide which rows come here, and change nothing about a row.

    Up to three windows of decoded rows are in memory at once: the one being trained on and the next two. A window has
    at least one span of steps: if that is too large, set `data.shuffle_steps` to 1.

    Raises `ShardError` when a chunk cannot be read.
    """

    sources: Sources
    reader: Reader
    order: Order | Mix
    _: KW_ONLY
    start: int
    stop: int
    rank: int = 0
    num_workers: int = 1
    part_rows: int | None = None  # None: two parts a task and window, within PART_ROWS
    window_spans: int | None = None  # None: up to WINDOW_ROWS rows and WINDOW_BYTES
    tasks: int = 1  # that run at once, and for a moment more where a window follows another
    in_process: bool = False  # the same work without Ray, in the calling process

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.order.schedule.total_steps and self.tasks > 0
        self._windows = self.windows()
        self._ahead = Overlapped(self._read)
        self._open: Generator[Batch] | None = None

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
        """How the steps are cut: first a window of one span, to start soon, then each of up to twice as many."""
        step, count = self.start, self.window_spans or 1
        by_rows = WINDOW_ROWS * max(1, self.tasks / 8)
        by_bytes = WINDOW_BYTES * max(1, self.tasks / 4) / self.reader.row_bytes
        most = math.inf if self.window_spans else min(by_rows, by_bytes)
        while step < self.stop:
            begin, spans, total = step, [], 0
            while step < self.stop and len(spans) < count:
                span = self.order.span(step)
                first, last = self._slices(step)
                end = min(span.stop, self.stop)
                total += (last - first) * self.order.schedule.slice_size * (end - step)
                if spans and total > most:
                    break
                spans.append(self.order.slice_rows(span, first, last, step, end))
                step = end
            yield Window(range(begin, step), self._cut_parts(Rows.concatenate(spans)))
            count = self.window_spans or 2 * len(spans)

    def _batches(self) -> Generator[Batch]:
        from vlmo_ray.data.batch import Batch

        size = self.order.schedule.slice_size
        while True:
            blocks = self._read(lambda: None) if self.in_process else self._ahead.next()
            window = next(blocks, None)
            if window is None:
                return
            for step, pieces in _by_step(window, blocks):
                first, last = self._slices(step)
                if first == last:
                    batch = Batch.empty(self.reader.encoder.columns)
                else:
                    batch = Batch.from_numpy(_together(pieces, range(first * size, last * size)))
                del pieces  # they keep blocks in memory
                yield batch

    def _read(self, nearly_done: Callable[[], None]) -> Iterator[Any]:
        """The next `Window`, then its blocks, of `Columns`; nothing after the last window.

        Calls `nearly_done` when only the last tasks of the window are running.
        """
        window = next(self._windows, None)
        if window is None:
            return
        missing = sum(map(len, window.parts))
        last = sum(map(len, window.parts[-self.tasks :]))
        if missing <= last:
            nearly_done()
        yield window
        for block in self._run(window.parts):
            before, missing = missing, missing - len(block["step"])
            if before > last >= missing:
                nearly_done()
            yield block

    def _cut_parts(self, rows: Rows) -> list[Part]:
        """Parts of about equal size: a chunk's rows are in one part, unless they are far more than a part."""
        least, most = PART_ROWS
        wanted = self.part_rows or min(most, max(least, len(rows) / (2 * self.tasks)))
        # chunks in the order in which they are needed, and in a chunk the rows by step
        _, first, chunk = np.unique(rows.chunk, return_index=True, return_inverse=True)
        order = np.argsort(first[chunk], kind="stable")
        sizes = np.bincount(chunk)[np.argsort(first)]
        cuts, end = [0], 0
        for size in sizes.tolist():
            pieces = math.ceil(size / min(2 * wanted, max(wanted, most)))
            for begin, stop in (deal(size, pieces, piece) for piece in range(pieces)):
                if end + (stop - begin) / 2 - cuts[-1] > wanted:  # the part is nearer to `wanted` without this piece
                    cuts.append(end)
                end += stop - begin
        chosen = [np.sort(part) for part in np.split(order, cuts[1:]) if len(part)]
        parts = [make_part(self.sources, rows.take(index)) for index in chosen]
        return sorted(parts, key=lambda part: part.step[0])

    def _slices(self, step: int) -> tuple[int, int]:
        return deal(self.order.schedule.num_slices(step), self.num_workers, self.rank)

    def _run(self, parts: list[Part]) -> Iterator[Columns]:
        """The columns of the parts, in order; Ray Data may cut those of a large part into several blocks."""
        if self.in_process or not parts:
            yield from map(self.reader, parts)
            return
        import ray
        import ray.data

        dataset = _dataset(
            parts,
            self.reader.or_failure,
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(self.tasks, len(parts))),
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            # a node that is about to leave takes no tasks any more, but its worker needs data until it has saved
            fallback_strategy=[{"label_selector": {}}],
        )
        # By default Ray Data takes all of the object store. A window is read whole, so this is its size, and as much
        # again for blocks under way.
        limits = dataset.context.execution_options.resource_limits
        dataset.context.execution_options.resource_limits = limits.copy(
            object_store_memory=(256 << 20) + 2 * sum(len(part) for part in parts) * self.reader.row_bytes
        )
        batches = iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
        with closing(cast("Generator[Columns]", batches)) as blocks:
            for columns in blocks:
                if columns["step"][0] < 0:
                    raise ShardError(columns["problem"][0])
                yield columns


def _by_step(window: Window, blocks: Iterator[Columns]) -> Iterator[tuple[int, list[Columns]]]:
    """Each step of the window, with the pieces of blocks that have its rows."""
    first_steps = [part.step[0] for part in window.parts]
    num_rows = np.cumsum([0, *map(len, window.parts)])
    pieces: list[Columns] = []
    received = 0
    for step in window.steps:
        while received < num_rows[np.searchsorted(first_steps, step, side="right")]:
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
    """The rows at `positions`, in order: always copies, as blocks are read-only and a view would keep them alive."""
    places = [piece["position"] - positions.start for piece in pieces]
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(positions)))
    columns = {}
    for name, column in pieces[0].items():
        kind = np.result_type(*(piece[name] for piece in pieces))
        columns[name] = np.empty((len(positions), *column.shape[1:]), kind)
        for piece, at in zip(pieces, places, strict=True):
            columns[name][at] = piece[name]
    return columns


def eval_dataset(sources: Sources, reader: Reader) -> ray.data.Dataset:
    """All rows once, in the order of the manifests, one block per chunk: the columns that `reader` gives.

    A chunk that cannot be read raises a `ShardError` inside an exception of Ray's: `prefetch.user_error` finds it.
    """
    return _dataset([whole_chunk(sources, index) for index in range(sources.num_chunks)], reader, num_cpus=1)


@functools.cache  # once a process
def _keep_freed_memory() -> None:
    """Keep memory that this process frees, up to about a GiB, for its next part.

    Otherwise every part's rows are in new pages, which cost a few per cent of the CPU time of decoding.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc has it
        libc.mallopt(_M_MMAP_MAX, 0)  # large arrays come from the heap as well
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _dataset(parts: list[Part], reader: Callable[[Part], Columns], **options) -> ray.data.Dataset:
    import ray.data

    quiet_ray()  # here too: a worker of Ray Train has joined no session of ours

    def read(block: Columns) -> Columns:
        _keep_freed_memory()
        (part,) = block["part"]
        return reader(pickle.loads(part))

    dataset = ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))
    # the stubs do not know that with batch_format="numpy" batches are dicts of arrays
    options |= {"batch_size": None, "batch_format": "numpy"}
    dataset = dataset.map_batches(read, **options)  # pyright: ignore[reportArgumentType]
    plain_errors(dataset)
    dataset.context.execution_options.preserve_order = True
    return dataset


def plain_errors(dataset: ray.data.Dataset) -> None:
    """A pipeline that shows no bars, and raises what its tasks raise."""
    context = dataset.context  # this dataset's own copy
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise the message of a `UserError` is lost
