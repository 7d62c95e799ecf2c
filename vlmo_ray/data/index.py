"""The chunks of shards that exist: of Parquet files with our columns, and of WebDataset tars."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.schema import PAIRS, Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.data.tar import TarError, iter_members, iter_samples
from vlmo_ray.errors import UserError

SCHEMA_KEY = b"vlmo.schema"  # in the footer of a Parquet shard


def row_group_range(footer: pq.FileMetaData, index: int) -> tuple[int, int]:
    """Offset and length of the bytes that hold row group `index`: its column chunks lie side by side."""
    group = footer.row_group(index)
    starts, ends = [], []
    for i in range(group.num_columns):
        column = group.column(i)
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            start = min(start, column.dictionary_page_offset)
        starts.append(start)
        ends.append(start + column.total_compressed_size)
    return min(starts), max(ends) - min(starts)


def _check_columns(address: str, stored: pa.Schema, schema: Schema) -> None:
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    for column in schema.arrow:
        if column.name == "forbid":  # may be missing
            continue
        have = stored.field(column.name).type if column.name in stored.names else "missing"
        if have not in (column.type, large.get(column.type)):
            raise UserError(
                f"{address}: the column {column.name!r} is {have}, not {column.type}; "
                "rewrite the data set with `vlmo prepare parquet` instead of indexing it"
            )


def parquet_chunks(file: pa.NativeFile, name: str) -> list[Chunk]:
    """The chunks of one open Parquet file; reads every byte once, for the checksums."""
    footer, chunks = pq.read_metadata(file), []
    for index in range(footer.num_row_groups):
        if rows := footer.row_group(index).num_rows:
            offset, length = row_group_range(footer, index)
            file.seek(offset)
            chunks.append(Chunk("parquet", name, index, offset, length, rows, zlib.crc32(file.read(length))))
    return chunks


def stored_schema(store: Store, name: str) -> Schema:
    """The schema that a Parquet shard states, `PAIRS` if it states none, as those of other people."""
    with _opened_parquet(store, name) as file:
        return _stated(pq.read_metadata(file), store.address(name)) or PAIRS


def check_stated(footer: pq.FileMetaData, schema: Schema, address: str) -> None:
    """UserError if the shard states a field otherwise than `schema` does, for example with other classes."""
    stated = _stated(footer, address) or schema
    for field in schema.fields:
        if field.name in stated and stated.field(field.name) != field:
            raise UserError(
                f"{address} states the column {field.name!r} as {_brief(stated.field(field.name))}, where "
                f"{_brief(field)} is wanted; keep the shards of different data sets apart"
            )


def _stated(footer: pq.FileMetaData, address: str) -> Schema | None:
    facts = (footer.metadata or {}).get(SCHEMA_KEY)
    try:
        return None if facts is None else Schema.from_json(json.loads(facts))
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{address}: the schema that it states cannot be used: {error}") from error


def _brief(field: Field) -> str:
    return f"{field.kind} of {len(field.values)} values ({', '.join(field.values[:3])}, ...)"


def index_parquet(store: Store, names: list[str], schema: Schema = PAIRS) -> list[Chunk]:
    """The chunks of Parquet shards that already have the columns of `schema`; UserError for other columns."""
    chunks = []
    for name in names:
        with _opened_parquet(store, name) as file:
            footer, address = pq.read_metadata(file), store.address(name)
            check_stated(footer, schema, address)
            _check_columns(address, footer.schema.to_arrow_schema(), schema)
            chunks += parquet_chunks(file, name)
    return chunks


@contextmanager
def _opened_parquet(store: Store, name: str) -> Iterator[pa.NativeFile]:
    address = store.address(name)
    try:
        with store.open_input(name) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{address} does not exist") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{address} cannot be read as Parquet: {error}") from error


def index_tar(store: Store, names: list[str], rows_per_chunk: int = 256, schema: Schema = PAIRS) -> list[Chunk]:
    """The chunks of plain tars: runs of `rows_per_chunk` records; reads every byte once, in order."""
    chunks = []
    for name in names:
        index = start = end = rows = crc = 0
        try:
            with store.open_stream(name) as file:
                for sample in iter_samples(iter_members(file.read)):
                    is_record = sample.is_record(schema)
                    if rows == rows_per_chunk:
                        chunks.append(Chunk("webdataset", name, index, start, end - start, rows, crc))
                        index, rows, crc = index + 1, 0, 0
                    if rows == 0 and not is_record:
                        continue
                    if rows == 0:
                        start = end = sample.offset
                    for data in sample.raw:
                        crc = zlib.crc32(data, crc)
                        end += len(data)
                    rows += is_record
            if rows:
                chunks.append(Chunk("webdataset", name, index, start, end - start, rows, crc))
        except FileNotFoundError as error:
            raise UserError(f"{store.address(name)} does not exist") from error
        except (TarError, OSError) as error:
            raise UserError(f"{store.address(name)}: {error}; fetch or make this tar again") from error
    return chunks
