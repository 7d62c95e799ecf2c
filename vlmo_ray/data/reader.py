"""A part, the unit of data work: some chunks are read once, and the wanted rows become NumPy columns.

This is all that runs in a data process, so nothing here (or imported from here) knows torch or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmo_ray.data.encoders import Draw, Encoder
from vlmo_ray.data.manifest import Chunk, Manifest
from vlmo_ray.data.order import Rows
from vlmo_ray.data.read import DamagedShard, read_chunk
from vlmo_ray.data.schema import Record, Schema, encodable
from vlmo_ray.data.store import Store
from vlmo_ray.errors import RecordError, UserError

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sources:
    """The data sets of a run, as one long row of chunks: those of the first, then those of the second, and so on."""

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
        """Address and schema of each data set: what a reader must know."""
        return tuple((manifest.uri, manifest.schema) for manifest in self.manifests)


@dataclass(frozen=True)
class Part:
    """Rows of a few chunks, with their places in the run; the arrays are int `[n]`.

    In an evaluation a row's place is where it is stored: `step` is its chunk, `position` its row.
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
    row = np.arange(chunk.rows, dtype=np.int64)
    place = np.full_like(row, index)
    return Part(((source, chunk),), np.zeros(len(row), np.int32), row.astype(np.int32), place, row)


@dataclass(frozen=True)
class Reader:
    """Part -> columns, rows in the order of the part.

    The encoder's columns, and of every batch: valid bool `[n]`, step, position int64 `[n]`, id, problem str `[n]`.
    A record that cannot be used has the columns' fill values and valid = False, and `problem` says why, with its
    address. A chunk that cannot be read raises `ShardError`; with `mask_damaged`, one that is damaged or missing
    (`DamagedShard`) is so many records that cannot be used.
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
        columns = {name: np.empty((n, *column.shape), column.dtype) for name, column in self.encoder.columns.items()}
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
                    ids[i] = f"{store.address(chunk.shard)}#{chunk.index}:{part.row[i]}"
                    problems[i] = f"{ids[i]}: its chunk is masked: {error}"
                continue
            for i in rows:
                record = records[part.row[i]]
                ids[i] = row_id(record)
                try:
                    if record.problem:
                        raise RecordError(record.problem)
                    row = self.encoder(record, self._draw(int(part.step[i]), int(part.position[i])))
                except RecordError as error:
                    problems[i] = encodable(f"{record.address}: {error}")
                else:
                    problems[i] = ""
                    for name, column in columns.items():
                        column[i] = row[name]
        valid = np.array([not problem for problem in problems], dtype=bool)
        for name, column in columns.items():
            column[~valid] = self.encoder.columns[name].fill
        places = {"step": part.step, "position": part.position}
        return columns | {"valid": valid, "id": ids, "problem": problems} | places

    def _draw(self, step: int, position: int) -> Draw | None:
        return None if self.seed is None else Draw(self.seed, step, position)

    @property
    def row_bytes(self) -> int:
        """What a decoded row takes in memory, about."""
        return 128 + sum(column.row_bytes for column in self.encoder.columns.values())

    def failure(self, sentence: str) -> Columns:
        """One row at step -1 with this `problem`: the message of a task that could not read its part."""
        columns = self(Part((), *np.full((4, 1), -1)))
        columns["problem"][0] = sentence
        return columns


def chunk_ids(manifest: Manifest, index: int) -> dict[str, str]:
    """Address -> id of a chunk's rows, as a batch has them: the rows of a damaged one have their addresses for ids."""
    store, chunk = Store(manifest.uri), manifest.chunk(index)
    try:
        records: Sequence[Record] = read_chunk(store, chunk, manifest.schema)
        return {record.address: row_id(record) for record in records}
    except DamagedShard:
        addresses = [f"{store.address(chunk.shard)}#{chunk.index}:{row}" for row in range(chunk.rows)]
        return dict(zip(addresses, addresses, strict=True))


def row_id(record: Record) -> str:
    """The record's id, or its address where it has none."""
    return encodable(record.id or record.address)


def _some(values: tuple[str, ...]) -> str:
    return f"{len(values)} ({', '.join(values[:3])}{', ...' if len(values) > 3 else ''})"
