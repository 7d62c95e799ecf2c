"""From a chunk of a shard to its records, with everything that can be wrong said by address."""

from __future__ import annotations

import functools
import io
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.manifest import FORBID, MANIFEST, Chunk, row_group_range
from vlmo_ray.data.s3 import StorageBusy
from vlmo_ray.data.store import Store
from vlmo_ray.data.tar import TarError, encodable, iter_groups, iter_members, pair_fields
from vlmo_ray.errors import UserError

_COLUMNS = ("id", "image_id", "image", "text", "forbid")
_TAIL_BYTES = 64 << 10  # read at first of a shard's end: most footers are shorter


class ShardError(UserError):
    """A whole chunk cannot be read; the message begins with its address."""


class DamagedShard(ShardError):
    """What is stored is at fault, not the way to it. Only this may be masked (`data.bad_shards`)."""


@dataclass
class Record:
    """One pair as it is stored; a record with a `problem` keeps its place but must be masked out."""

    id: str
    image_id: str
    image: bytes | None
    text: str | None
    forbid: tuple[str, ...]  # augmentations that would make the caption untrue
    problem: str  # "" where all is well
    address: str  # <uri>/<shard>#<chunk>:<row>


def read_chunk(store: Store, chunk: Chunk, *, retries: int = 4, wait_s: float = 0.5) -> list[Record]:
    """The `chunk.rows` records of a chunk, in order, from one range read.

    Storage that is busy or away is asked again for `store.retry_timeout_s`. Wrong checksums and other errors, which
    may come from the way, are tried again `retries` times, after `wait_s`, twice that, and so on, with jitter.
    Raises DamagedShard with the address if the chunk is missing or still not what the manifest says, and another
    ShardError if there still is no access to it.
    """
    address = f"{store.address(chunk.shard)}#{chunk.index}"
    for attempt in range(retries + 1):
        try:
            # a shard that ends before the chunk begins gives nothing, where S3 would refuse
            data = _take(store, chunk.shard, lambda f: f.read_at(chunk.bytes, min(chunk.offset, f.size())))
            if len(data) < chunk.bytes:
                raise DamagedShard(f"the shard ends {chunk.bytes - len(data)} bytes before the chunk does")
            if zlib.crc32(data) != chunk.crc:
                raise DamagedShard("the checksum is wrong: the shard has changed since it was prepared")
            rows = _DECODERS[chunk.format](store, chunk, data)
            if len(rows) != chunk.rows:
                raise DamagedShard(f"{len(rows)} records were found where the manifest says {chunk.rows}")
            return [_record(row, chunk, f"{address}:{i}") for i, row in enumerate(rows)]
        except FileNotFoundError as error:
            raise DamagedShard(f"{address}: the shard does not exist; prepare it again") from error
        except StorageBusy as error:
            raise ShardError(f"{address}: {error}") from error
        except (UserError, TarError, OSError, pa.ArrowException) as error:
            _footer.cache_clear()  # it may be what was read wrongly
            if attempt == retries:
                no_access = isinstance(error, UserError) and not isinstance(error, DamagedShard)
                kind = ShardError if no_access else DamagedShard
                raise kind(f"{address}: {error} (tried {retries + 1} times)") from error
            time.sleep(wait_s * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _take(store: Store, shard: str, take: Callable[[pa.NativeFile], bytes]) -> bytes:
    """What `take` reads of the open shard. FileNotFoundError if the shard is missing but not the data set."""

    def attempt() -> bytes:
        with store.fs.open_input_file(store.path(shard)) as file:
            return take(file)

    try:
        return store.patiently(shard, attempt)
    except FileNotFoundError as error:
        if not store.exists(MANIFEST):  # a bucket that was deleted, a disk that is not mounted
            nor = store.address(MANIFEST)
            raise UserError(f"neither the shard nor {nor} exists; check the bucket or the mount") from error
        raise


def _record(row: dict, chunk: Chunk, address: str) -> Record:
    image, text, problem = row["image"], row["text"], row.get("problem", "")
    own = tuple(row.get("forbid") or ())
    forbid = tuple(name for name in FORBID if name in chunk.forbid or name in own)
    unknown = sorted(set(own) - set(FORBID))
    if not problem:
        if not image:
            problem = "there is no image"
        elif not isinstance(text, str) or not text.strip():
            problem = "there is no caption"
        elif not text.isascii() and encodable(text) != text:
            problem = "the caption is not valid Unicode"
        elif not row["id"] or not row["image_id"]:
            problem = "there is no id or no image_id"
        elif unknown:
            problem = f"forbid={unknown[0]!r} is not one of {', '.join(FORBID)}"
    return Record(row["id"] or "", row["image_id"] or "", image, text, forbid, problem, address)


class _Range(io.RawIOBase):
    """A file of which only `data`, at `offset`, is present: what a Parquet reader needs for one row group."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        self._data, self._offset, self._size, self._at = data, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, n: int = -1) -> bytes:
        n = self._size - self._at if n < 0 else n
        start = self._at - self._offset
        if start < 0 or start + n > len(self._data):
            raise OSError(f"the row group needs bytes {self._at} to {self._at + n}, outside of its own range")
        self._at += n
        return self._data[start : start + n]


@functools.lru_cache(maxsize=256)
def _footer(store: Store, shard: str) -> pq.FileMetaData:
    tail = _take(store, shard, _tail)  # before it is parsed, so that what goes wrong is told apart
    return pq.read_metadata(pa.BufferReader(tail))


def _tail(file: pa.NativeFile) -> bytes:
    """The end of a Parquet file, with all of the footer."""
    size = file.size()
    tail = file.read_at(min(size, _TAIL_BYTES), max(size - _TAIL_BYTES, 0))
    length = int.from_bytes(tail[-8:-4], "little") + 8  # then its mark
    longer = tail.endswith(b"PAR1") and len(tail) < length <= size
    return file.read_at(length, size - length) if longer else tail


def _decode_parquet(store: Store, chunk: Chunk, data: bytes) -> list[dict]:
    footer = _footer(store, chunk.shard)
    known = chunk.index < footer.num_row_groups
    if not known or row_group_range(footer, chunk.index) != (chunk.offset, chunk.bytes):
        raise DamagedShard("the footer of the shard does not agree with the manifest; prepare it again")
    source = pa.PythonFile(_Range(data, chunk.offset, chunk.offset + chunk.bytes), mode="r")
    file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, pre_buffer=False)
    columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
    table = file.read_row_group(chunk.index, columns=columns, use_threads=False)
    for i, name in enumerate(table.schema.names):  # Arrow does not check UTF-8 when it reads
        if name in ("id", "image_id", "text"):
            table = table.set_column(i, name, table.column(name).cast(pa.large_binary()))
    return [_decoded(row) for row in table.to_pylist()]


def _decoded(row: dict) -> dict:
    for name in ("id", "image_id", "text"):
        try:
            row[name] = None if row[name] is None else row[name].decode()
        except UnicodeDecodeError:
            row[name] = row[name].decode("utf-8", "replace")
            row["problem"] = f"the column {name!r} is not UTF-8"
    return row


def _decode_webdataset(store: Store, chunk: Chunk, data: bytes) -> list[dict]:
    groups = iter_groups(iter_members(io.BytesIO(data).read, whole=False))
    return [pair_fields(chunk.shard, group) for group in groups if group.is_record]


_DECODERS = {"parquet": _decode_parquet, "webdataset": _decode_webdataset}
