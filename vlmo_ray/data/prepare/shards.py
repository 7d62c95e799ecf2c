"""Writing Parquet shards of records, and whole small data sets from an iterator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.index import SCHEMA_KEY, parquet_chunks
from vlmo_ray.data.manifest import MANIFEST, Chunk, Manifest, check_forbid, chunk_table, write_manifest
from vlmo_ray.data.schema import PAIRS, Record, Schema, check_declared, problem_of
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError


def _row_groups(rows: Iterable[dict], rows_per_group: int, schema: pa.Schema) -> Iterator[pa.Table]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, rows_per_group)):
        assert all(set(row) == set(schema.names) for row in group), schema.names
        yield pa.table({name: [row[name] for row in group] for name in schema.names}, schema=schema)


def _writer_options(schema: pa.Schema) -> dict:
    """Encoded images are neither compressed nor given a dictionary: they do not compress, and rarely repeat."""
    leaves = {leaf: kind for column in schema for leaf, kind in _leaves(column.name, column.type)}
    return {
        "compression": {leaf: "none" if kind == pa.binary() else "zstd" for leaf, kind in leaves.items()},
        "use_dictionary": [leaf for leaf in leaves if leaf in ("image_id", "forbid.list.element")],
        "write_statistics": False,
        "write_page_checksum": True,
    }


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """The paths in Parquet, and the types, of what is stored for a column."""
    if pa.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for member in kind:
            yield from _leaves(f"{path}.{member.name}", member.type)
    else:
        yield path, kind


def write_shards(
    store: Store,
    rows: Iterable[dict],
    name: str,
    *,
    rows_per_group: int = 256,
    shard_bytes: int | None = None,
    groups_per_shard: int | None = None,
    schema: Schema = PAIRS,
) -> list[Chunk]:
    """Write the rows in order, to shards called `name.format(0)`, `name.format(1)`, ...

    A row has the columns of `schema.arrow`; its values are not checked. A shard ends once it has `shard_bytes` or
    `groups_per_shard` row groups. Each appears when it is complete.
    """
    chunks: list[Chunk] = []
    stored, number = schema.arrow, 0
    groups = _row_groups(rows, rows_per_group, stored)
    group = next(groups, None)
    while group is not None:
        shard, number = name.format(number), number + 1
        with store.create(shard) as file:
            with pq.ParquetWriter(file, stored, **_writer_options(stored)) as writer:
                writer.add_key_value_metadata({SCHEMA_KEY: json.dumps(schema.to_json())})
                for num_groups in itertools.count(1):
                    writer.write_table(group, row_group_size=rows_per_group)
                    group = next(groups, None)
                    full = (shard_bytes and file.tell() >= shard_bytes) or num_groups == groups_per_shard
                    if group is None or full:
                        break
            chunks += parquet_chunks(file, shard)  # before it is published, while it is on this machine
    return chunks


def write_dataset(
    uri: str,
    records: Iterable[dict],
    rows_per_group: int = 256,
    groups_per_shard: int = 16,
    forbid: tuple[str, ...] = (),
    source: str = "",
    schema: Schema = PAIRS,
) -> Manifest:
    """Write records with `id`, `image_id`, the fields of `schema` and perhaps `forbid`, in their order, as a data set.

    For drawn and small data: it keeps all ids in memory and does not check the images. Raises UserError if `uri`
    already holds a data set, or a record is not valid, has a column that is not declared, or repeats an id; then there
    is no manifest, so no data set.
    """
    check_forbid(forbid)
    store = open_store(uri, create=True)
    if store.exists(MANIFEST):
        raise UserError(f"{store.uri} already holds a data set; delete it or choose another place")
    seen: set[str] = set()

    def rows() -> Iterator[dict]:
        for row in records:
            values = {name: value for name, value in row.items() if name not in ("id", "image_id", "forbid")}
            check_declared(values, schema)
            forbid = tuple(row.get("forbid") or ())
            record = Record(row.get("id") or "", row.get("image_id") or "", values, forbid)
            if problem := problem_of(record, schema):
                raise UserError(f"record {len(seen)} ({record.id or 'without an id'}): {problem}")
            if record.id in seen:
                raise UserError(f"the id {record.id!r} comes twice")
            seen.add(record.id)
            yield values | {"id": record.id, "image_id": record.image_id, "forbid": forbid}

    chunks = write_shards(
        store, rows(), "{:05d}.parquet", rows_per_group=rows_per_group, groups_per_shard=groups_per_shard, schema=schema
    )
    return write_manifest(store.uri, "parquet", chunk_table(chunks), forbid=tuple(forbid), source=source, schema=schema)
