"""Which pairs a run consumed, as its workers record it, and which ones its data set has, as an audit reads both.

Each worker records the ids that it found in the decoded records: one Parquet file per checkpoint, under
`audit/<attempt>/`. An attempt is one start of the run. The newest checkpoint states from which step on each attempt
counts, so steps that a lost attempt did after its last checkpoint are not counted.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import Manifest
from vlmo_ray.data.order import Order
from vlmo_ray.data.read import chunk_address, read_ids
from vlmo_ray.data.reader import chunk_ids
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.multisets import keys_of

_FOLDER = "audit"
_THREADS = 4  # that read files; each file that is read ahead is in memory

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Consumed:
    """The pairs that one worker has consumed since its last checkpoint."""

    attempt: str
    _steps: list[tuple[int, np.ndarray, pa.Array, np.ndarray]] = field(default_factory=list)

    def add(self, step: int, batch: Batch) -> None:
        ids = pa.array(batch.ids, pa.string())
        self._steps.append((step, batch.position.numpy(force=True), ids, batch.valid.numpy(force=True)))

    def take(self) -> dict[str, bytes]:
        """Everything added since the last call, as files of the run: name -> content."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        rows = {
            "step": pa.array(np.concatenate([np.full(len(p), step, np.int32) for step, p, _, _ in steps])),
            "position": pa.array(np.concatenate([p.astype(np.int32) for _, p, _, _ in steps])),
            "id": pa.chunked_array([ids for _, _, ids, _ in steps]),
            "valid": pa.array(np.concatenate([valid for _, _, _, valid in steps])),
        }
        out = io.BytesIO()
        pq.write_table(pa.table(rows), out, compression="zstd")
        first = int(steps[0][1][0])
        return {f"{_FOLDER}/{self.attempt}/{steps[0][0]:08d}-{first:08d}.parquet": out.getvalue()}


@dataclass(frozen=True)
class Recorded:
    """Rows of the log."""

    step: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n]
    valid: np.ndarray  # bool [n]
    names: pa.Array  # [n]: ids, or addresses of masked rows without one
    keys: np.ndarray  # of the names, uint64 [n]


@dataclass(frozen=True)
class Log:
    """What the attempts of a run recorded, each from its first step up to the first step of the next attempt."""

    store: Store
    attempts: list[tuple[int, str]]
    stop: int

    def read(self) -> Iterator[Recorded]:
        """The committed rows, file by file. Raises UserError if there is no record."""
        ends = [first for first, _ in self.attempts[1:]] + [self.stop]
        counts = {name: (first, end) for (first, name), end in zip(self.attempts, ends, strict=True)}
        files = []
        for name in self.store.list(f"{_FOLDER}/"):
            first, end = counts.get(PurePosixPath(name).parent.name, (0, 0))
            if int(PurePosixPath(name).name.partition("-")[0]) < end:
                files.append((name, first, end))
        if not files:
            raise UserError(f"{self.store.uri} has no record of its pairs under {_FOLDER}/")
        return _ahead(self._read, files)

    def _read(self, file: tuple[str, int, int]) -> Recorded:
        name, first, end = file
        table = pq.read_table(io.BytesIO(self.store.read(name)), use_threads=False)
        step = table.column("step").to_numpy()
        table = table.filter(pa.array((step >= first) & (step < end)))
        step, position = (table.column(name).to_numpy().astype(np.int64) for name in ("step", "position"))
        names = table.column("id").combine_chunks()
        return Recorded(step, position, table.column("valid").to_numpy(), names, keys_of(names))


@dataclass(frozen=True)
class Stored:
    """Rows of the data set, all of one shard."""

    names: pa.Array  # [n]: ids, or addresses of rows that have none or cannot be read
    keys: np.ndarray  # of the names, uint64 [n]
    due: np.ndarray  # bool [n]: whether the newest epoch should have consumed the row by now
    ids: dict[str, str]  # address -> name, of the rows that were asked for


@dataclass(frozen=True)
class DataIds:
    """The ids of a data set, without the rest of its records where the shards are Parquet."""

    manifest: Manifest
    order: Order
    stop: int  # the number of committed steps

    def read(self, addresses: AbstractSet[str] = frozenset()) -> Iterator[Stored]:
        """All rows, shard by shard; `addresses` are of rows whose names are needed."""
        ends = np.searchsorted(self.manifest.chunk_shard, np.arange(len(self.manifest.shards)), side="right")
        spans = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
        whole, rest = self._due()
        shards = {address.rpartition("#")[0] for address in addresses}
        store = Store(self.manifest.uri)

        def read(span: tuple[int, int]) -> Stored:
            chunks = [self.manifest.chunk(i) for i in range(*span)]
            places = (f"{chunk_address(store, chunk)}:{row}" for chunk in chunks for row in range(chunk.rows))
            known: dict[str, str] = {}
            names = read_ids(store, chunks)
            if names is None:
                known = {place: name for i in range(*span) for place, name in chunk_ids(self.manifest, i).items()}
            elif names.null_count or names.index("").as_py() >= 0 or store.address(chunks[0].shard) in shards:
                known = {place: name or place for place, name in zip(places, names.to_pylist(), strict=True)}
            names = pa.array(known.values(), pa.string()) if known else names
            sizes = self.manifest.chunk_rows[slice(*span)]
            due = np.repeat(whole[slice(*span)], sizes)
            for i, begin in zip(range(*span), (np.cumsum(sizes) - sizes).tolist(), strict=True):
                if i in rest:
                    due[begin + rest[i]] = True
            return Stored(names, keys_of(names), due, {place: known[place] for place in known.keys() & addresses})

        return _ahead(read, spans)

    def _due(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Of the epoch of the last step: which chunks are due as a whole, bool [C], and which rows of other chunks."""
        order, last = self.order, self.stop - 1
        schedule, span = order.schedule, order.span(last)
        epoch = (schedule.rows_before(self.stop) - 1) // order.num_rows
        # the spans before have consumed the first rows of the epoch's sequence, whatever their order among themselves
        begin = max(0, schedule.rows_before(span.start) - epoch * order.num_rows)
        chunks, ends = order.epoch(epoch)
        whole = np.zeros(len(chunks), bool)
        whole[chunks[ends <= begin]] = True
        rows = order.slice_rows(span, 0, schedule.num_slices(last), stop=self.stop)
        rows = rows.take(np.flatnonzero(rows.epoch == epoch))
        rest = {int(chunk): rows.row[rows.chunk == chunk] for chunk in np.unique(rows.chunk)}
        cut = int(np.searchsorted(ends, begin, side="right"))
        if cut < len(chunks):
            chunk = int(chunks[cut])
            done = np.arange(begin - (ends[cut] - order.chunk_rows[chunk]))
            rest[chunk] = np.concatenate([done, rest[chunk]]) if chunk in rest else done
        return whole, rest


def _ahead(read: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`read` of each item, in order, by threads that are a few items ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
