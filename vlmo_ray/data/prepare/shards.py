"""Writing Parquet shards of pairs, and whole small data sets from an iterator."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.manifest import (
    MANIFEST,
    Chunk,
    Manifest,
    check_forbid,
    chunk_table,
    parquet_chunks,
    write_manifest,
)
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image_id": pa.string(),
        "image": pa.binary(),
        "text": pa.string(),
        "forbid": pa.list_(pa.string()),
    }
)


def _groups(rows: Iterable[dict], rows_per_group: int) -> Iterator[pa.Table]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, rows_per_group)):
        yield pa.table({name: [row[name] for row in group] for name in SCHEMA.names}, schema=SCHEMA)


def write_shards(
    store: Store,
    rows: Iterable[dict],
    name: str,
    *,
    rows_per_group: int = 256,
    shard_bytes: int | None = None,
    groups_per_shard: int | None = None,
) -> list[Chunk]:
    """Write the rows in order, to shards called `name.format(0)`, `name.format(1)`, ...

    A shard ends once it has `shard_bytes` or `groups_per_shard` row groups. Each appears when it is complete.
    """
    chunks: list[Chunk] = []
    groups = _groups(rows, rows_per_group)
    group = next(groups, None)
    for number in itertools.count():
        if group is None:
            return chunks
        shard = name.format(number)
        with store.create(shard) as file:
            # Encoded images do not compress and repeat too rarely for a dictionary.
            with pq.ParquetWriter(
                file,
                SCHEMA,
                compression={
                    "id": "zstd",
                    "image_id": "zstd",
                    "image": "none",
                    "text": "zstd",
                    "forbid.list.element": "zstd",
                },
                use_dictionary=["image_id", "forbid.list.element"],
                write_statistics=False,
                write_page_checksum=True,
            ) as writer:
                for num_groups in itertools.count(1):
                    writer.write_table(group, row_group_size=rows_per_group)
                    group = next(groups, None)
                    full = (shard_bytes and file.tell() >= shard_bytes) or num_groups == groups_per_shard
                    if group is None or full:
                        break
            chunks += parquet_chunks(file, shard)  # before it is published, while it lies on this machine
    raise AssertionError("unreachable")


def write_dataset(
    uri: str,
    records: Iterable[dict],
    rows_per_group: int = 256,
    groups_per_shard: int = 16,
    forbid: tuple[str, ...] = (),
    source: str = "",
) -> Manifest:
    """Write records with `id, image_id, image, text` and perhaps `forbid`, in their order, as a data set.

    For made-up and small data: it keeps all ids in memory and does not look into the images. Raises UserError
    if `uri` already holds a data set, or a record lacks a field or repeats an id.
    """
    check_forbid(forbid)
    store = open_store(uri, create=True)
    if store.exists(MANIFEST):
        raise UserError(f"{store.uri} already holds a data set; delete it or choose another place")
    seen: set[str] = set()

    def rows() -> Iterator[dict]:
        for record in records:
            missing = [name for name in ("id", "image_id", "image", "text") if not record.get(name)]
            if missing:
                raise UserError(f"record {len(seen)} has no {missing[0]!r}")
            if record["id"] in seen:
                raise UserError(f"the id {record['id']!r} comes twice")
            seen.add(record["id"])
            own = tuple(record.get("forbid") or ())
            check_forbid(own)
            yield {**record, "forbid": own}

    chunks = write_shards(
        store, rows(), "{:05d}.parquet", rows_per_group=rows_per_group, groups_per_shard=groups_per_shard
    )
    return write_manifest(store.uri, "parquet", chunk_table(chunks), forbid=tuple(forbid), source=source)
