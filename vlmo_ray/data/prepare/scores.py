"""Leaves out records by a score that a model gave them: noisy pairs, by the cosine of the dual encoder."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmo_ray.data.prepare.source import Source, WorkUnit, open_file
from vlmo_ray.data.schema import Record
from vlmo_ray.data.store import store_and_name
from vlmo_ray.errors import UserError
from vlmo_ray.rng import hash_text


class Scored(Source):
    """Another source, whose records get a problem if their score is below `least` or missing.

    `scores` is a Parquet file with the columns id and score, as an evaluation leaves beside its result. 12 bytes a
    record are in the memory of each data process.
    """

    def __init__(self, source: Source, scores: str, least: float):
        self.source, self.scores, self.least = source, scores, least
        self.schema, self.uri = source.schema, source.uri
        store, name = open_file(scores)
        self.scores = store.address(name)
        self.listing = f"{source.listing} {store.versions(name)[name]} {least}"
        self.versions = source.versions
        _scores(self.scores)  # raises what is wrong with it before anything is read

    def units(self) -> list[WorkUnit]:
        return self.source.units()

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        keys, values = _scores(self.scores)
        for record in self.source.records(unit):
            if not record.problem:
                key = hash_text(record.id)
                place = int(np.searchsorted(keys, key))
                if place == len(keys) or keys[place] != key:
                    record.problem = "it has no score"
                elif not values[place] >= self.least:
                    record.problem = f"its score is below {self.least:g}"
            yield record

    def __getstate__(self) -> dict:
        return self.__dict__ | {"listing": "", "versions": ""}


@functools.lru_cache(maxsize=1)
def _scores(address: str) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the ids, sorted, int64; their scores, float32). Read once in a data process."""
    store, name = store_and_name(address)
    try:
        with store.open_input(name) as file:
            table = pq.ParquetFile(file)
            if missing := [column for column in ("id", "score") if column not in table.schema_arrow.names]:
                raise UserError(
                    f"{address} has no column {missing[0]!r}; name the Parquet file that an evaluation wrote"
                )
            pieces = [_piece(batch) for batch in table.iter_batches(1 << 16, columns=["id", "score"])]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{address} cannot be read as Parquet with the columns id and score: {error}") from error
    if not pieces:
        raise UserError(f"{address} has no rows")
    keys, values = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    order = np.argsort(keys)
    return keys[order], values[order]


def _piece(rows: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    keys = np.array([hash_text(id) for id in rows.column("id").to_pylist()], np.int64)
    return keys, pc.cast(rows.column("score"), pa.float32()).to_numpy(zero_copy_only=False)
