"""The engine: any source, of any size, to shuffled shards in bounded memory.

Every pair gets a key, a hash of (seed, id), and the data set is the pairs in the order of their keys. So the
order is a random permutation of all pairs that depends on nothing else: not on the number of tasks, nor on
how the source is cut. Two passes make it with little memory. The first ("scatter") reads splits of the source
and writes pieces, each with its pairs sorted by key and cut into buckets, which are ranges of keys. The
second ("gather") reads one bucket out of all pieces, some hundred megabytes, sorts it, and writes its shards.
Bucket 0 followed by bucket 1 and so on is the whole order. Equal ids have equal keys and so meet in a bucket,
where all but the first in the source are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vlmo_ray.data.manifest import FORBID, Chunk
from vlmo_ray.data.prepare.shards import SCHEMA, write_shards
from vlmo_ray.data.prepare.source import Source, Split, image_problem
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.read import Record
from vlmo_ray.data.store import Store
from vlmo_ray.data.tar import encodable

MAX_LISTED = 10_000  # dropped pairs that are listed by address; all are counted
_ROW_BYTES = 400  # what a pair takes in memory besides its image and caption
_PIECE = SCHEMA.append(pa.field("address", pa.string())).append(pa.field("order", pa.int64()))
_PIECE = _PIECE.set(_PIECE.get_field_index("image"), pa.field("image", pa.large_binary()))
_CHUNK_FIELDS = ("shard", "index", "offset", "bytes", "rows", "crc")


@dataclass(frozen=True)
class Job:
    """What both passes need to know; picklable."""

    source: Source
    out: Store
    seed: int
    num_buckets: int
    memory: int  # bytes of pairs that a task may hold
    shard_bytes: int
    rows_per_group: int
    verify: bool


def num_buckets(source_bytes: int, memory: int) -> int:
    """So many that a bucket and what the Parquet writer holds fit in `memory`, estimates being rough."""
    return max(1, -(-source_bytes * 3 // memory))


def key_of(seed: int, id: str) -> int:
    """The place of a pair in the order: 64 random bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=8).digest(), "little")


def bucket_of(key: int, buckets: int) -> int:
    """Buckets are equal ranges of keys, so that they follow each other in the order."""
    return key * buckets >> 64


class _Dropped:
    """Counts by reason, and the first addresses."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.listed: list[dict] = []

    def add(self, id: str, address: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append({"id": id, "address": address, "reason": reason})


def problem_of(record: Record, verify: bool) -> str:
    """Why a pair must be dropped, "" if it is kept."""
    if record.problem:
        return record.problem
    if not isinstance(record.text, str) or not record.text.strip():
        return "the caption is empty"
    if not record.id or not record.image_id:
        return "there is no id or no image_id"
    if any(encodable(s) != s for s in (record.id, record.image_id, record.text)):
        return "the caption or an id is not valid Unicode"
    if any(name not in FORBID for name in record.forbid):
        return f"forbid has a value other than {', '.join(FORBID)}"
    return image_problem(record.image, verify)


def scatter(job: Job, task: tuple[int, Split]) -> dict:
    """First pass, one split: write its good pairs as pieces `<split>-<n>`; count and list the bad."""
    number, split = task
    dropped, rows, held, num_read, num_pieces = _Dropped(), [], 0, 0, 0
    for record in job.source.records(split):
        num_read += 1
        record.address = encodable(record.address)
        if reason := problem_of(record, job.verify):
            dropped.add(record.id, record.address, reason)
            continue
        rows.append((key_of(job.seed, record.id), (number << 32) + num_read, record))
        held += len(record.image) + len(record.text) + _ROW_BYTES
        if held >= job.memory // 4:
            _write_piece(job, f"{number:07d}-{num_pieces}", rows)
            rows, held, num_pieces = [], 0, num_pieces + 1
    if rows:
        _write_piece(job, f"{number:07d}-{num_pieces}", rows)
        num_pieces += 1
    return {"read": num_read, "pieces": num_pieces, "dropped": dropped.counts, "listed": dropped.listed}


def _write_piece(job: Job, name: str, rows: list[tuple[int, int, Record]]) -> None:
    """One file: the offset of each bucket's section, then the sections as Arrow streams, or nothing."""
    rows.sort(key=lambda row: row[:2])
    bucket = np.array([bucket_of(key, job.num_buckets) for key, _, _ in rows])
    edges = np.searchsorted(bucket, np.arange(job.num_buckets + 1))
    offsets = np.zeros(job.num_buckets + 1, np.int64)
    with job.out.create(f"{WORK}/pieces/{name}") as file:
        file.write(offsets.tobytes())
        for b in range(job.num_buckets):
            offsets[b] = file.tell()
            part = rows[edges[b] : edges[b + 1]]
            if part:
                columns = {n: [getattr(r, n) for _, _, r in part] for n in _PIECE.names if n != "order"}
                columns["order"] = [order for _, order, _ in part]
                with pa.ipc.new_stream(file, _PIECE) as stream:
                    stream.write_batch(pa.record_batch(columns, schema=_PIECE))
        offsets[-1] = file.tell()
        file.seek(0)
        file.write(offsets.tobytes())


def _read_section(job: Job, name: str, bucket: int) -> list[pa.RecordBatch]:
    with job.out.open_input(f"{WORK}/pieces/{name}") as file:
        start, end = np.frombuffer(file.read_at(16, 8 * bucket), np.int64).tolist()
        return list(pa.ipc.open_stream(file.read_at(end - start, start))) if end > start else []


def gather(job: Job, pieces: list[int], bucket: int) -> dict:
    """Second pass, one bucket: its pairs from all pieces, in order, to its shards `<bucket>-<n>.parquet`.

    `pieces` is how many the first pass made of each split.
    """
    names = [f"{number:07d}-{n}" for number, count in enumerate(pieces) for n in range(count)]
    with ThreadPoolExecutor(4) as pool:
        batches = [b for part in pool.map(lambda n: _read_section(job, n, bucket), names) for b in part]
    rows = []
    for b, batch in enumerate(batches):
        for i, (id, order) in enumerate(
            zip(batch["id"].to_pylist(), batch["order"].to_pylist(), strict=True)
        ):
            rows.append((key_of(job.seed, id), id, order, b, i))
    rows.sort()
    dropped = _Dropped()

    def kept() -> Iterator[dict]:
        last = None
        for _, id, _, b, i in rows:
            if id == last:
                dropped.add(id, batches[b]["address"][i].as_py(), "the id is a duplicate")
            else:
                yield {name: batches[b][name][i].as_py() for name in SCHEMA.names}
            last = id

    # Shards of equal size, instead of full ones and a small rest.
    total = sum(batch.nbytes for batch in batches)
    shard_bytes = total // max(1, round(total / job.shard_bytes)) + 1
    name = f"{bucket:05d}-{{:03d}}.parquet"
    chunks = write_shards(job.out, kept(), name, rows_per_group=job.rows_per_group, shard_bytes=shard_bytes)
    return {
        "chunks": pack_chunks(chunks),
        "dropped": dropped.counts,
        "listed": dropped.listed,
    }


def pack_chunks(chunks: list[Chunk]) -> list[list]:
    """Chunks as JSON."""
    return [[getattr(chunk, name) for name in _CHUNK_FIELDS] for chunk in chunks]


def unpack_chunks(format: str, packed: list[list]) -> list[Chunk]:
    return [Chunk(format, *fields) for fields in packed]
