"""The chunks of shards that exist: Parquet files with our columns, and WebDataset tars."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.schema import PAIRS, Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.data.tar import TarError, iter_members, iter_samples
from vlmo_ray.errors import UserError

SCHEMA_KEY = b"vlmo.schema"  # in the footer of a Parquet shard


def row_group_range(footer: pq.FileMetaData, index: int, name: str = "") -> tuple[int, int]:
    """Offset and length of the bytes that hold row group `index`, or its column `name`: columns are adjacent."""
    group, starts, ends = footer.row_group(index), [], []
    for column in map(group.column, range(group.num_columns)):
        if name and column.path_in_schema != name:
            continue
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
    """The schema that a Parquet shard states; `PAIRS` if it states none, as shards that others have written."""
    with _opened_parquet(store, name) as file:
        return _stated(pq.read_metadata(file), store.address(name)) or PAIRS


def check_stated(footer: pq.FileMetaData, schema: Schema, address: str) -> None:
    """UserError if the shard and `schema` differ in a field of the same name, for example in its classes."""
    stated = _stated(footer, address) or schema
    for field in schema.fields:
        if field.name in stated and stated.field(field.name) != field:
            raise UserError(
                f"{address} states the column {field.name!r} as {_brief(stated.field(field.name))}, not as "
                f"{_brief(field)}; keep the shards of different data sets apart"
            )


def _stated(footer: pq.FileMetaData, address: str) -> Schema | None:
    facts = (footer.metadata or {}).get(SCHEMA_KEY)
    try:
        return None if facts is None else Schema.from_json(json.loads(facts))
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{address} states a schema that cannot be used: {error}") from error


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
        index, chunk = 0, None
        try:
            with store.open_stream(name) as file:
                for sample in iter_samples(iter_members(file.read)):
                    is_record = sample.is_record(schema)
                    if chunk and chunk.rows == rows_per_chunk:
                        chunks.append(chunk)
                        index, chunk = index + 1, None
                    if is_record and chunk is None:
                        chunk = Chunk("webdataset", name, index, sample.offset, bytes=0, rows=0, crc=0)
                    if chunk:
                        raw = b"".join(sample.raw)
                        size, crc = chunk.bytes + len(raw), zlib.crc32(raw, chunk.crc)
                        chunk = replace(chunk, bytes=size, rows=chunk.rows + is_record, crc=crc)
            chunks += [chunk] if chunk else []
        except FileNotFoundError as error:
            raise UserError(f"{store.address(name)} does not exist") from error
        except (TarError, OSError) as error:
            raise UserError(f"{store.address(name)}: {error}; fetch or make this tar again") from error
    return chunks
