"""From a chunk of a shard to its records; every error names its address."""

from __future__ import annotations

import bisect
import functools
import io
import random
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.index import row_group_range
from vlmo_ray.data.manifest import MANIFEST, Chunk
from vlmo_ray.data.s3 import StorageBusy
from vlmo_ray.data.schema import FORBID, PAIRS, Record, Schema, problem_of
from vlmo_ray.data.store import Store
from vlmo_ray.data.tar import TarError, iter_members, iter_samples, record_of
from vlmo_ray.errors import UserError

T = TypeVar("T")

_TAIL_BYTES = 64 << 10  # what is read first of a shard's end: most footers are shorter


class ShardError(UserError):
    """A whole chunk cannot be read; the message begins with its address."""


class DamagedShard(ShardError):
    """The stored data is wrong or missing. Only this error may be masked (`data.bad_shards`)."""


def chunk_address(store: Store, chunk: Chunk) -> str:
    """`<shard>#<chunk>`. The address of a row is `<shard>#<chunk>:<row>`."""
    return f"{store.address(chunk.shard)}#{chunk.index}"


def read_chunk(
    store: Store,
    chunk: Chunk,
    schema: Schema = PAIRS,
    names: Collection[str] | None = None,
    *,
    retries: int = 4,
    wait_s: float = 0.5,
) -> list[Record]:
    """The `chunk.rows` records of a chunk, in order, from one range read.

    `schema` is that of the manifest. Of its fields, only `names` are decoded and checked, by default all.

    Requests to storage that is busy or away are repeated for `store.retry_timeout_s`. Wrong checksums and other errors,
    which may come from the transfer, are retried `retries` times, after `wait_s`, twice that, and so on, with jitter.
    Raises DamagedShard with the address if the chunk is missing or still not what the manifest says, and another
    ShardError if it still cannot be accessed.
    """
    address = chunk_address(store, chunk)
    for attempt in range(retries + 1):
        try:
            # S3 refuses an offset beyond the end of the shard; at the end, it gives no bytes
            data = _take(store, chunk.shard, lambda f: f.read_at(chunk.bytes, min(chunk.offset, f.size())))
            if len(data) < chunk.bytes:
                raise DamagedShard(f"the shard ends {chunk.bytes - len(data)} bytes before the chunk does")
            if zlib.crc32(data) != chunk.crc:
                raise DamagedShard("the checksum is wrong: the shard has changed since it was prepared")
            wanted = schema.names if names is None else names
            records = _DECODERS[chunk.format](store, chunk, data, schema, wanted)
            if len(records) != chunk.rows:
                raise DamagedShard(f"{len(records)} records were found where the manifest says {chunk.rows}")
            for row, record in enumerate(records):
                record.problem = problem_of(record, schema, wanted)
                own, record.address = record.forbid, f"{address}:{row}"
                record.forbid = tuple(name for name in FORBID if name in chunk.forbid or name in own)
            return records
        except FileNotFoundError as error:
            raise DamagedShard(f"{address}: the shard does not exist; prepare it again") from error
        except StorageBusy as error:
            raise ShardError(f"{address}: {error}") from error
        except (UserError, TarError, OSError, pa.ArrowException) as error:
            _footer.cache_clear()  # the footer may be what was read wrongly
            if attempt == retries:
                no_access = isinstance(error, UserError) and not isinstance(error, DamagedShard)
                kind = ShardError if no_access else DamagedShard
                raise kind(f"{address}: {error} (tried {retries + 1} times)") from error
            time.sleep(wait_s * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _take(store: Store, shard: str, take: Callable[[pa.NativeFile], T]) -> T:
    """What `take` reads of the open shard. FileNotFoundError if the shard is missing but not the data set."""

    def attempt() -> T:
        with store.fs.open_input_file(store.path(shard)) as file:
            return take(file)

    try:
        return store.patiently(shard, attempt)
    except FileNotFoundError as error:
        if not store.exists(MANIFEST):  # a bucket that was deleted, a disk that is not mounted
            manifest = store.address(MANIFEST)
            raise UserError(f"neither the shard nor {manifest} exists; check the bucket or the mount") from error
        raise


class _Ranges(io.RawIOBase):
    """A file of which only some ranges are present, offset -> bytes: all that a Parquet reader needs of its pages."""

    def __init__(self, ranges: dict[int, bytes]) -> None:
        self._ranges, self._offsets = ranges, sorted(ranges)
        self._size, self._at = self._offsets[-1] + len(ranges[self._offsets[-1]]), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, n: int = -1) -> bytes:
        n = self._size - self._at if n < 0 else n
        offset = self._offsets[max(0, bisect.bisect_right(self._offsets, self._at) - 1)]
        start, data = self._at - offset, self._ranges[offset]
        if start < 0 or start + n > len(data):
            raise OSError(f"the row group needs bytes {self._at} to {self._at + n}, outside of its own range")
        self._at += n
        return data[start : start + n]


@functools.lru_cache(maxsize=256)
def _footer(store: Store, shard: str) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(_take(store, shard, _tail)))


def _tail(file: pa.NativeFile) -> bytes:
    """The end of a Parquet file, with all of the footer."""
    size = file.size()
    tail = file.read_at(min(size, _TAIL_BYTES), max(size - _TAIL_BYTES, 0))
    length = int.from_bytes(tail[-8:-4], "little") + 8  # then its mark
    longer = tail.endswith(b"PAR1") and len(tail) < length <= size
    return file.read_at(length, size - length) if longer else tail


def _decode_parquet(store: Store, chunk: Chunk, data: bytes, schema: Schema, names: Collection[str]) -> list[Record]:
    footer = _footer(store, chunk.shard)
    exists = chunk.index < footer.num_row_groups
    if not exists or row_group_range(footer, chunk.index) != (chunk.offset, chunk.bytes):
        raise DamagedShard("the footer of the shard does not agree with the manifest; prepare it again")
    file = _parquet({chunk.offset: data}, footer)
    for name in names:
        if name not in file.schema_arrow.names:
            raise DamagedShard(f"the shard has no column {name!r}; prepare it again")
    columns = [name for name in ("id", "image_id", *names, "forbid") if name in file.schema_arrow.names]
    table = file.read_row_group(chunk.index, columns=columns, use_threads=False)
    records = [Record("", "", {}) for _ in range(table.num_rows)]
    for name in columns:
        for record, (value, readable) in zip(records, _values(table.column(name)), strict=True):
            if not readable:
                record.problem = record.problem or f"the column {name!r} is not UTF-8"
            if name in names:
                record.values[name] = value
            else:
                setattr(record, name, tuple(value or ()) if name == "forbid" else value or "")
    return records


def _parquet(ranges: dict[int, bytes], footer: pq.FileMetaData) -> pq.ParquetFile:
    source = pa.PythonFile(_Ranges(ranges), mode="r")
    return pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, pre_buffer=False)


def read_ids(store: Store, chunks: list[Chunk]) -> pa.Array | None:
    """The stored ids of all rows of `chunks`, which are of one shard. Of a Parquet shard nothing else is read.

    None if they cannot be had alone, as the shard is a tar, or not what the manifest says: then `read_chunk` must do.
    """
    shard = chunks[0].shard
    if chunks[0].format != "parquet":
        return None
    try:
        footer = _footer(store, shard)
        if any(row_group_range(footer, chunk.index) != (chunk.offset, chunk.bytes) for chunk in chunks):
            return None
        places = [row_group_range(footer, chunk.index, "id") for chunk in chunks]
        data = _take(store, shard, lambda f: [f.read_at(length, offset) for offset, length in places])
        file = _parquet({offset: part for (offset, _), part in zip(places, data, strict=True)}, footer)
        groups = file.read_row_groups([chunk.index for chunk in chunks], columns=["id"], use_threads=False)
        ids = groups.column("id").combine_chunks()
        ids.validate(full=True)  # that they are UTF-8
    except (FileNotFoundError, IndexError, pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return None
    return ids if len(ids) == sum(chunk.rows for chunk in chunks) else None


def _values(column: pa.ChunkedArray) -> Iterator[tuple[Any, bool]]:
    """The values, and whether each could be read: Arrow checks UTF-8 only when it makes Python strings."""
    try:
        yield from [(value, True) for value in column.to_pylist()]
    except UnicodeDecodeError:
        for scalar in column:
            try:
                yield scalar.as_py(), True
            except UnicodeDecodeError:
                yield None, False


def _decode_webdataset(store: Store, chunk: Chunk, data: bytes, schema: Schema, names: Collection[str]) -> list[Record]:
    samples = iter_samples(iter_members(io.BytesIO(data).read, whole=False))
    return [record_of(chunk.shard, sample, schema, names) for sample in samples if sample.is_record(schema)]


_DECODERS = {"parquet": _decode_parquet, "webdataset": _decode_webdataset}
