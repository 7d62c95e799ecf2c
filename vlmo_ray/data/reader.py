"""From a part (rows of a few chunks, read at once) to NumPy columns.

This is all that a data process runs, so nothing here, or imported from here, imports torch or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmo_ray.data.encoders import Draw, Encoder
from vlmo_ray.data.manifest import Chunk, Manifest
from vlmo_ray.data.order import Rows
from vlmo_ray.data.read import DamagedShard, ShardError, chunk_address, read_chunk
from vlmo_ray.data.schema import Record, Schema, encodable
from vlmo_ray.data.store import Store
from vlmo_ray.errors import RecordError, UserError

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sources:
    """The data sets of a run as one sequence of chunks: those of the first, then those of the second, and so on."""

    manifests: tuple[Manifest, ...]

    @cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0, *(manifest.num_chunks for manifest in self.manifests)])

    @property
    def num_chunks(self) -> int:
        return int(self._first[-1])

    @property
    def num_rows(self) -> int:
        return sum(manifest.num_rows for manifest in self.manifests)

    def chunk(self, index: int) -> tuple[int, Chunk]:
        """(number of the data set, the chunk)."""
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        return source, self.manifests[source].chunk(index - int(self._first[source]))

    @property
    def places(self) -> tuple[tuple[str, Schema], ...]:
        """Address and schema of each data set, for `Reader`."""
        return tuple((manifest.uri, manifest.schema) for manifest in self.manifests)


@dataclass(frozen=True)
class Part:
    """Rows of a few chunks, with their places in the run; the arrays are int `[n]`.

    In an evaluation, `step` is the number of the chunk and `position` the row in it.
    """

    chunks: tuple[tuple[int, Chunk], ...]  # each with the number of its data set
    chunk: np.ndarray  # index into `chunks`
    row: np.ndarray  # in that chunk
    step: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def make_part(sources: Sources, rows: Rows) -> Part:
    chunks, index = np.unique(rows.chunk, return_inverse=True)
    described = tuple(sources.chunk(int(chunk)) for chunk in chunks)
    return Part(described, index.astype(np.int32), rows.row.astype(np.int32), rows.step, rows.position)


def whole_chunk(sources: Sources, index: int) -> Part:
    """All rows of one chunk, for an evaluation."""
    source, chunk = sources.chunk(index)
    return one_chunk(chunk, source, index)


def one_chunk(chunk: Chunk, source: int = 0, index: int = 0) -> Part:
    """All rows of a chunk of the data set `source`, which is number `index` of all."""
    row = np.arange(chunk.rows, dtype=np.int64)
    return Part(((source, chunk),), np.zeros(chunk.rows, np.int32), row.astype(np.int32), np.full_like(row, index), row)


@dataclass(frozen=True)
class Reader:
    """Part -> columns, rows in the order of the part.

    Returns the encoder's columns and, in every batch: valid bool `[n]`, step, position int64 `[n]`, id, problem str
    `[n]`. A record that cannot be used has valid = False and the columns' fill values, and `problem` gives its address
    and the reason. A chunk that cannot be read raises `ShardError`; with `mask_damaged`, all records of a damaged or
    missing chunk (`DamagedShard`) are invalid instead.
    """

    places: tuple[tuple[str, Schema], ...]  # of the data sets, as `Sources.places`
    encoder: Encoder
    seed: int | None = None  # None: an evaluation, nothing is drawn
    mask_damaged: bool = False
    retry_timeout_s: float = 0.0

    def __post_init__(self) -> None:
        for uri, schema in self.places:
            if missing := [name for name in self.encoder.fields if name not in schema]:
                raise UserError(
                    f"{uri} has no column {missing[0]!r} (it has {', '.join(schema.names)}), which this task reads; "
                    "name another data set, or prepare this one again with that column"
                )
            for name, wanted in self.encoder.values.items():
                if (found := schema.field(name).values) != wanted:
                    raise UserError(
                        f"{uri} has other values of {name!r} than the weights were trained on: {_some(found)} in "
                        f"place of {_some(wanted)}; prepare it with the same list"
                    )

    def __call__(self, part: Part) -> Columns:
        n = len(part)
        columns = {name: np.full((n, *c.shape), c.fill, c.dtype) for name, c in self.encoder.columns.items()}
        ids, problems = np.full(n, "", dtype=object), np.full(n, "not read", dtype=object)
        for index, (source, chunk) in enumerate(part.chunks):
            uri, schema = self.places[source]
            store = Store(uri, self.retry_timeout_s)
            rows = np.flatnonzero(part.chunk == index)
            try:
                records = read_chunk(store, chunk, schema, self.encoder.fields)
            except DamagedShard as error:
                if not self.mask_damaged:
                    raise
                for i in rows:
                    ids[i] = f"{chunk_address(store, chunk)}:{part.row[i]}"
                    problems[i] = f"{ids[i]}: its chunk is masked: {error}"
                continue
            for i in rows:
                record = records[part.row[i]]
                ids[i] = _row_id(record)
                draw = None if self.seed is None else Draw(self.seed, int(part.step[i]), int(part.position[i]))
                try:
                    if record.problem:
                        raise RecordError(record.problem)
                    row = self.encoder(record, draw)
                except RecordError as error:
                    problems[i] = encodable(f"{record.address}: {error}")
                else:
                    problems[i] = ""
                    for name, column in columns.items():
                        column[i] = row[name]
        valid = np.array([not problem for problem in problems], dtype=bool)
        return columns | {"valid": valid, "id": ids, "problem": problems, "step": part.step, "position": part.position}

    def or_failure(self, part: Part) -> Columns:
        """The columns of the part, or in place of a `ShardError` one row at step -1 whose `problem` is its message.

        An exception in a data task would come inside one of Ray's, which adds advice to the message; Ray would print
        two tracebacks; and it would come before the batches of the parts ahead of this one.
        """
        try:
            return self(part)
        except ShardError as error:
            columns = self(Part((), *np.full((4, 1), -1)))
            columns["problem"][0] = str(error)
            return columns

    @property
    def row_bytes(self) -> int:
        """About what a decoded row takes in memory."""
        return 128 + sum(column.row_bytes for column in self.encoder.columns.values())


def chunk_ids(manifest: Manifest, index: int) -> dict[str, str]:
    """Address -> id of a chunk's rows, as batches name them: in a damaged chunk, a row's id is its address."""
    store, chunk = Store(manifest.uri), manifest.chunk(index)
    try:
        return {record.address: _row_id(record) for record in read_chunk(store, chunk, manifest.schema)}
    except DamagedShard:
        addresses = [f"{chunk_address(store, chunk)}:{row}" for row in range(chunk.rows)]
        return dict(zip(addresses, addresses, strict=True))


def _row_id(record: Record) -> str:
    """The record's id, or its address if it has none."""
    return encodable(record.id or record.address)


def _some(values: tuple[str, ...]) -> str:
    return f"{len(values)} ({', '.join(values[:3])}{', ...' if len(values) > 3 else ''})"
