"""The table of a data set's chunks: where each lies, how many rows it has, and its checksum.

A chunk is a row group of a Parquet shard, or a run of records of a WebDataset tar. A billion records are some four
million chunks, so there is no Python object per chunk: the manifest is six NumPy columns, 32 bytes a chunk. Reading it
lists no bucket and opens no shard.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.schema import FORBID, PAIRS, Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

MANIFEST = "manifest.parquet"
VERSION = 2  # version 1 states no schema: all its data sets are `PAIRS`
Format = Literal["parquet", "webdataset"]
_COLUMNS = {"index": np.int32, "offset": np.int64, "bytes": np.int64, "rows": np.int32, "crc": np.uint32}


@dataclass(frozen=True)
class Chunk:
    """One chunk, as it is sent to another process."""

    format: Format
    shard: str
    index: int  # row group number, or run number in the tar
    offset: int
    bytes: int
    rows: int
    crc: int  # zlib.crc32 of bytes [offset, offset + bytes) of the shard
    forbid: tuple[str, ...] = ()  # of the data set; added to each record's own


@dataclass(frozen=True, eq=False)
class Manifest:
    """All chunks of a data set, in the order of the shards; C chunks."""

    uri: str
    format: Format
    shards: tuple[str, ...]
    chunk_shard: np.ndarray  # int32 [C], an index into shards
    chunk_index: np.ndarray  # int32 [C]
    chunk_offset: np.ndarray  # int64 [C], bytes
    chunk_bytes: np.ndarray  # int64 [C]
    chunk_rows: np.ndarray  # int32 [C]
    chunk_crc: np.ndarray  # uint32 [C]
    forbid: tuple[str, ...]
    fingerprint: str  # sha256 of everything but the address and the source
    source: str = ""
    schema: Schema = PAIRS

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_rows)

    @property
    def num_rows(self) -> int:
        return int(self.chunk_rows.sum(dtype=np.int64))

    def chunk(self, i: int) -> Chunk:
        numbers = {name: int(getattr(self, f"chunk_{name}")[i]) for name in _COLUMNS}
        return Chunk(self.format, self.shards[self.chunk_shard[i]], **numbers, forbid=self.forbid)


def _assemble(
    uri: str,
    format: Format,
    table: pa.Table,
    forbid: tuple[str, ...],
    source: str,
    schema: Schema,
    version: int = VERSION,
) -> Manifest:
    """A manifest from a table with a `shard` column, plain or dictionary-encoded, and `_COLUMNS`.

    The fingerprint is computed as by the version that wrote the manifest, since stored runs refer to it.
    """
    table = table.unify_dictionaries()
    shard = table.column("shard").combine_chunks()
    if not pa.types.is_dictionary(shard.type):
        shard = shard.dictionary_encode()
    columns = {
        f"chunk_{name}": np.ascontiguousarray(table.column(name).to_numpy(), dtype=dtype)
        for name, dtype in _COLUMNS.items()
    }
    number = np.ascontiguousarray(shard.indices.to_numpy(), dtype=np.int32)
    shards = tuple(shard.dictionary.to_pylist())
    # Shards are numbered by first appearance, so that equal data sets have equal fingerprints.
    assert (np.diff(number, prepend=-1) >= 0).all() and (np.diff(number, prepend=-1) <= 1).all()
    facts = [version, format, shards, forbid] + ([schema.to_json()] if version > 1 else [])
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in (number, *columns.values()):
        digest.update(array.tobytes())
    facts = {"forbid": forbid, "fingerprint": digest.hexdigest(), "source": source, "schema": schema}
    return Manifest(uri, format, shards, number, **columns, **facts)


def chunk_table(chunks: list[Chunk]) -> pa.Table:
    """The table that `write_manifest` takes, from chunks in the order of the data set."""
    columns = {name: np.array([getattr(c, name) for c in chunks], dtype) for name, dtype in _COLUMNS.items()}
    shard = pa.array([c.shard for c in chunks], pa.string()).dictionary_encode()
    return pa.table({"shard": shard} | columns)


def write_manifest(
    uri: str,
    format: Format,
    chunks: pa.Table,
    *,
    forbid: tuple[str, ...] = (),
    source: str = "",
    schema: Schema = PAIRS,
) -> Manifest:
    """Write `manifest.parquet`, the last file of a data set: without it there is no data set.

    `chunks` has the columns shard, index, offset, bytes, rows, crc; the chunks of a shard are next to each other.
    """
    check_forbid(forbid)
    store = Store(uri)
    if not chunks.num_rows:
        raise UserError(f"{store.uri}: not one record is left, so there is no data set to write")
    manifest = _assemble(store.uri, format, chunks, tuple(forbid), source, schema)
    shard = pa.DictionaryArray.from_arrays(manifest.chunk_shard, pa.array(manifest.shards, pa.string()))
    columns = (getattr(manifest, f"chunk_{name}") for name in _COLUMNS)
    facts = {
        "version": VERSION,
        "format": format,
        "fingerprint": manifest.fingerprint,
        "num_rows": manifest.num_rows,
        "forbid": manifest.forbid,
        "source": source,
        "schema": schema.to_json(),
    }
    table = pa.table([shard, *columns], names=["shard", *_COLUMNS])
    table = table.replace_schema_metadata({"vlmo": json.dumps(facts)})
    with store.create(MANIFEST) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return manifest


def load_manifest(uri: str, retry_timeout_s: float | None = None) -> Manifest:
    """The manifest of the data set at `uri`; UserError if there is none, or it is damaged or too new.

    If the storage does not answer, that is an error at once, or after `retry_timeout_s`.
    """
    store = open_store(uri) if retry_timeout_s is None else Store(uri, retry_timeout_s)
    address = store.address(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError as error:
        raise UserError(
            f"{address} does not exist: {store.uri} is not a prepared data set; run `vlmo prepare` first"
        ) from error
    manifest = None
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        facts = json.loads(table.schema.metadata[b"vlmo"])
        version = facts["version"]
        if version in (1, VERSION):
            schema = PAIRS if version == 1 else Schema.from_json(facts["schema"])
            forbid, source = tuple(facts["forbid"]), facts["source"]
            manifest = _assemble(store.uri, facts["format"], table, forbid, source, schema, version)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{address} is not a manifest or is damaged ({error}); prepare it again") from error
    if manifest is None:
        raise UserError(
            f"{address} has version {version}, this program reads versions 1 to {VERSION}; "
            "prepare the data set again, or install the version of vlmo-ray that made it"
        )
    if (manifest.fingerprint, manifest.num_rows) != (facts["fingerprint"], facts["num_rows"]):
        raise UserError(f"{address} does not have the fingerprint that it states; prepare the data set again")
    return manifest


def check_forbid(forbid: tuple[str, ...]) -> None:
    """UserError unless every name is one of `FORBID`."""
    for name in forbid:
        if name not in FORBID:
            raise UserError(f"forbid={name!r} is not an augmentation; choose from {', '.join(FORBID)}")


def check_shards(manifest: Manifest, store: Store, most: int = 64) -> None:
    """UserError if a shard is missing or cut short; checks at most `most` shards, evenly spaced."""
    last = np.flatnonzero(np.diff(manifest.chunk_shard, append=len(manifest.shards)))
    picks = np.unique(np.linspace(0, len(last) - 1, min(most, len(last))).astype(int))

    def check(pick: int) -> None:
        chunk = manifest.chunk(last[pick])
        size, want = store.size(chunk.shard), chunk.offset + chunk.bytes
        if size is None:
            raise UserError(f"{store.address(chunk.shard)} is named in the manifest but does not exist")
        if size < want:
            raise UserError(
                f"{store.address(chunk.shard)} has {size} bytes, its manifest needs {want}: it is cut short "
                "or was replaced; copy it again, or prepare the data set again"
            )

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, picks.tolist()))
