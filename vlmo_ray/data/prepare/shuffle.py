"""A source of any size to shuffled shards, in bounded memory.

Every record gets a key, a hash of (seed, id), and the data set is the records in the order of their keys. So the order
is a random permutation of all records that depends neither on the number of tasks nor on how the source is cut. Two
passes make it with little memory. The first ("scatter") reads work units of the source and writes pieces, each with its
records sorted by key and cut into buckets, which are ranges of keys. The second ("gather") reads one bucket out of all
pieces, some hundred megabytes, sorts it, and writes its shards. The buckets one after another are the whole order.
Equal ids have equal keys and so are in one bucket, where all but the first in the source are dropped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vlmo_ray.data.decode import image_problem
from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.prepare.shards import write_shards
from vlmo_ray.data.prepare.source import Source, WorkUnit
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.schema import Record, Schema, check_declared, encodable, problem_of
from vlmo_ray.data.store import Store

MAX_LISTED = 10_000  # dropped records that are listed by address; all are counted
_ROW_BYTES = 400  # what a record takes in memory besides its values


@dataclass(frozen=True)
class Shuffle:
    """The parameters of both passes; picklable."""

    source: Source
    out: Store
    seed: int
    num_buckets: int  # so that a bucket fits in `memory`
    memory: int  # bytes of records that a task may hold
    shard_bytes: int
    rows_per_group: int
    verify: bool


def key_of(seed: int, id: str) -> int:
    """The place of a record in the order: 64 random bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=8).digest(), "little")


@dataclass
class Dropped:
    """Counts by reason, and the first `MAX_LISTED` addresses."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict] = field(default_factory=list)

    def add(self, id: str, address: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append({"id": id, "address": address, "reason": reason})

    def merge(self, result: dict) -> None:
        """Add those of a task."""
        self.counts.update(result["dropped"])
        self.listed += result["listed"][: MAX_LISTED - len(self.listed)]


def _problem(record: Record, schema: Schema, verify: bool) -> str:
    """Why a record must be dropped, "" if it is kept; looks into its images."""
    problem = problem_of(record, schema)
    for column in schema.fields:
        if not problem and column.kind in ("image", "mask"):
            problem = image_problem(record.values[column.name], verify, is_mask=column.kind == "mask")
    return problem


def _num_bytes(value: Any) -> int:
    """About what a value takes in memory."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 32


def scatter(shuffle: Shuffle, numbered: tuple[int, WorkUnit]) -> dict:
    """First pass, one work unit: write its good records as pieces `<unit>-<n>`; count and list the bad."""
    number, unit = numbered
    schema = shuffle.source.schema
    dropped, rows, held, num_read, num_pieces = Dropped(), [], 0, 0, 0
    for record in shuffle.source.records(unit):
        num_read += 1
        check_declared(record.values, schema)
        record.address = encodable(record.address)
        if reason := _problem(record, schema, shuffle.verify):
            dropped.add(record.id, record.address, reason)
            continue
        rows.append((key_of(shuffle.seed, record.id), (number << 32) + num_read, record))
        held += sum(map(_num_bytes, record.values.values())) + _ROW_BYTES
        if held >= shuffle.memory // 4:
            _write_piece(shuffle, f"{number:07d}-{num_pieces}", rows)
            rows, held, num_pieces = [], 0, num_pieces + 1
    if rows:
        _write_piece(shuffle, f"{number:07d}-{num_pieces}", rows)
        num_pieces += 1
    return {"read": num_read, "pieces": num_pieces, "dropped": dropped.counts, "listed": dropped.listed}


def _write_piece(shuffle: Shuffle, name: str, rows: list[tuple[int, int, Record]]) -> None:
    """One file: the offset of each bucket's section, then the sections, each an Arrow stream or empty."""
    rows.sort(key=lambda row: row[:2])
    # the stored columns, with room for more than 2 GiB of images, and where each record is from
    kinds = {c.name: pa.large_binary() if c.type == pa.binary() else c.type for c in shuffle.source.schema.arrow}
    schema = pa.schema(kinds | {"_address": pa.string(), "_order": pa.int64()})
    bucket = np.array([key * shuffle.num_buckets >> 64 for key, _, _ in rows])  # equal ranges of keys
    edges = np.searchsorted(bucket, np.arange(shuffle.num_buckets + 1))
    offsets = np.zeros(shuffle.num_buckets + 1, np.int64)
    with shuffle.out.create(f"{WORK}/pieces/{name}") as file:
        file.write(offsets.tobytes())
        for b in range(shuffle.num_buckets):
            offsets[b] = file.tell()
            section = [
                record.values
                | {"id": record.id, "image_id": record.image_id, "forbid": record.forbid}
                | {"_address": record.address, "_order": order}
                for _, order, record in rows[edges[b] : edges[b + 1]]
            ]
            if section:
                columns = {name: [row[name] for row in section] for name in schema.names}
                with pa.ipc.new_stream(file, schema) as stream:
                    stream.write_batch(pa.record_batch(columns, schema=schema))
        offsets[-1] = file.tell()
        file.seek(0)
        file.write(offsets.tobytes())


def gather(shuffle: Shuffle, pieces: list[int], bucket: int) -> dict:
    """Second pass, one bucket: write its records from all pieces, in order, to its shards `<bucket>-<n>.parquet`.

    `pieces` is how many pieces the first pass made of each work unit.
    """

    def section(name: str) -> list[pa.RecordBatch]:
        with shuffle.out.open_input(f"{WORK}/pieces/{name}") as file:
            start, end = np.frombuffer(file.read_at(16, 8 * bucket), np.int64).tolist()
            return list(pa.ipc.open_stream(file.read_at(end - start, start))) if end > start else []

    names = [f"{number:07d}-{n}" for number, count in enumerate(pieces) for n in range(count)]
    with ThreadPoolExecutor(4) as pool:
        batches = [batch for batches in pool.map(section, names) for batch in batches]
    rows = []
    for b, batch in enumerate(batches):
        for i, (id, order) in enumerate(zip(batch["id"].to_pylist(), batch["_order"].to_pylist(), strict=True)):
            rows.append((key_of(shuffle.seed, id), id, order, b, i))
    rows.sort()
    dropped, schema = Dropped(), shuffle.source.schema.arrow

    def kept() -> Iterator[dict]:
        last = None
        for _, id, _, b, i in rows:
            if id == last:
                dropped.add(id, batches[b]["_address"][i].as_py(), "the id is a duplicate")
            else:
                yield {name: batches[b][name][i].as_py() for name in schema.names}
            last = id

    # shards of equal size, instead of full ones and a small rest
    total = sum(batch.nbytes for batch in batches)
    shard_bytes = total // max(1, round(total / shuffle.shard_bytes)) + 1
    cuts = {"rows_per_group": shuffle.rows_per_group, "shard_bytes": shard_bytes}
    name = f"{bucket:05d}-{{:03d}}.parquet"
    chunks = write_shards(shuffle.out, kept(), name, **cuts, schema=shuffle.source.schema)
    return {"chunks": packed(chunks), "dropped": dropped.counts, "listed": dropped.listed}


def packed(chunks: list[Chunk]) -> list[list]:
    """Chunks as JSON: shard, index, offset, bytes, rows, crc."""
    return [list(astuple(chunk)[1:7]) for chunk in chunks]
