"""Manifests survive a round trip, notice every change, stay small, and their chunks cover the shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, make_records
from sources import tar_of

from vlmo_ray.data.index import index_parquet, index_tar
from vlmo_ray.data.manifest import MANIFEST, check_shards, chunk_table, load_manifest, write_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_round_trip(place, tmp_path, request):
    uri = str(tmp_path / "set") if place == "folder" else request.getfixturevalue("bucket")
    written = write_dataset(uri, make_records(23), rows_per_group=5, groups_per_shard=2, forbid=("crop",))
    loaded = load_manifest(uri)
    assert loaded.chunk_rows.tolist() == [5, 5, 5, 5, 3]
    assert loaded.chunk_shard.tolist() == [0, 0, 1, 1, 2] and loaded.chunk_index.tolist() == [0, 1, 0, 1, 0]
    assert loaded.shards == ("00000.parquet", "00001.parquet", "00002.parquet")
    assert (loaded.num_rows, loaded.num_chunks, loaded.forbid) == (23, 5, ("crop",))
    assert loaded.fingerprint == written.fingerprint and loaded.format == "parquet"
    dtypes = [getattr(loaded, f"chunk_{c}").dtype for c in ("shard", "index", "offset", "bytes", "rows", "crc")]
    assert dtypes == [np.int32, np.int32, np.int64, np.int64, np.int32, np.uint32]
    check_shards(loaded, Store(uri))


def test_chunks_are_what_the_shards_hold(tmp_path):
    manifest = write_dataset(str(tmp_path), make_records(11), rows_per_group=4, groups_per_shard=2)
    store = Store(str(tmp_path))
    for i in range(manifest.num_chunks):
        chunk = manifest.chunk(i)
        data = (tmp_path / chunk.shard).read_bytes()[chunk.offset : chunk.offset + chunk.bytes]
        assert zlib.crc32(data) == chunk.crc
        assert sum(record["image"] in data for record in make_records(11)) >= chunk.rows
    assert chunk_table(index_parquet(store, list(manifest.shards))).num_rows == 3


def test_the_fingerprint_knows_the_data_not_the_place(tmp_path):
    def fingerprint(place, records, **options):
        return write_dataset(str(tmp_path / place), records, 4, **options).fingerprint

    records = make_records(9)
    first = fingerprint("a", records)
    assert first == fingerprint("b", records)
    changed = [*records[:-1], records[-1] | {"text": "caption B \N{SNOWMAN}"}]
    others = [
        fingerprint("c", changed),
        fingerprint("d", records, forbid=("flip",)),
        fingerprint("e", records, groups_per_shard=1),
    ]
    assert len({first, *others}) == 4


def _edit(path, columns=None, facts=None):
    table = pq.read_table(path)
    for name, value in (columns or {}).items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(value, table[name].type))
    known = json.loads(table.schema.metadata[b"vlmo"]) | (facts or {})
    pq.write_table(table.replace_schema_metadata({"vlmo": json.dumps(known)}), path)


def test_manifests_of_version_1_are_pairs_and_keep_their_fingerprint(tmp_path):
    """Stored runs refer to it, so the way it was computed is written out here."""
    manifest = write_dataset(str(tmp_path), make_records(7), 4, groups_per_shard=1, forbid=("flip",))
    digest = hashlib.sha256(json.dumps([1, "parquet", manifest.shards, ("flip",)]).encode())
    for name in ("shard", "index", "offset", "bytes", "rows", "crc"):
        digest.update(getattr(manifest, f"chunk_{name}").tobytes())
    path = tmp_path / MANIFEST
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"vlmo"]) | {"version": 1, "fingerprint": digest.hexdigest()}
    assert facts.pop("schema") == PAIRS.to_json()
    pq.write_table(table.replace_schema_metadata({"vlmo": json.dumps(facts)}), path)
    old = load_manifest(str(tmp_path))
    assert old.fingerprint == digest.hexdigest() != manifest.fingerprint
    assert old.schema == PAIRS and old.num_rows == 7
    _edit(path, facts={"fingerprint": manifest.fingerprint})
    with pytest.raises(UserError, match="fingerprint"):
        load_manifest(str(tmp_path))


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match="vlmo prepare"):
        load_manifest(str(tmp_path))
    path = tmp_path / MANIFEST
    write_dataset(str(tmp_path), make_records(7), 4)
    good = path.read_bytes()

    _edit(path, {"rows": [4, 4]})
    with pytest.raises(UserError, match="fingerprint"):
        load_manifest(str(tmp_path))
    path.write_bytes(good)
    _edit(path, facts={"forbid": ["flip"]})
    with pytest.raises(UserError, match="fingerprint"):
        load_manifest(str(tmp_path))
    path.write_bytes(good)
    _edit(path, facts={"schema": [{"name": "text", "kind": "text"}]})
    with pytest.raises(UserError, match="fingerprint"):
        load_manifest(str(tmp_path))
    path.write_bytes(good)
    _edit(path, facts={"schema": [{"name": "sound", "kind": "sound"}]})
    with pytest.raises(UserError, match=r"damaged .*'sound' is not a kind"):
        load_manifest(str(tmp_path))
    path.write_bytes(good)
    _edit(path, facts={"version": 99})
    with pytest.raises(UserError, match="version 99"):
        load_manifest(str(tmp_path))
    path.write_bytes(good[:-20])
    with pytest.raises(UserError, match="damaged"):
        load_manifest(str(tmp_path))
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="not a manifest"):
        load_manifest(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(str(tmp_path / "elsewhere"))


def test_check_shards(tmp_path):
    manifest = write_dataset(str(tmp_path), make_records(12), 2, groups_per_shard=2)
    store, path = Store(str(tmp_path)), tmp_path / "00001.parquet"
    good = path.read_bytes()
    path.write_bytes(good[: manifest.chunk_offset[3]])
    with pytest.raises(UserError, match=r"00001\.parquet has .* cut short"):
        check_shards(manifest, store)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.parquet is named in the manifest but does not exist"):
        check_shards(manifest, store)
    check_shards(manifest, store, most=2)  # the first and the last


def test_write_dataset_errors(tmp_path):
    records = make_records(3)
    write_dataset(str(tmp_path / "a"), records)
    with pytest.raises(UserError, match="already holds"):
        write_dataset(str(tmp_path / "a"), records)
    with pytest.raises(UserError, match="comes twice"):
        write_dataset(str(tmp_path / "b"), [*records, records[0]])
    assert not (tmp_path / "b" / MANIFEST).exists()
    with pytest.raises(UserError, match="forbid='spin'"):
        write_dataset(str(tmp_path / "c"), records, forbid=("spin",))
    with pytest.raises(UserError, match=r"record 3 \(pair-0\): there is no text"):
        write_dataset(str(tmp_path / "d"), [*records, records[0] | {"text": ""}])
    with pytest.raises(UserError, match="not one record"):
        write_dataset(str(tmp_path / "e"), [])


def test_index_parquet_wants_our_columns(tmp_path):
    pq.write_table(pa.table({"id": [1], "image": [b"x"], "text": ["t"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: the column 'id' is int64.*vlmo prepare parquet"):
        index_parquet(Store(str(tmp_path)), ["x.parquet"])
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"y\.parquet cannot be read as Parquet"):
        index_parquet(Store(str(tmp_path)), ["y.parquet"])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_tar_covers_every_record(tmp_path, format):
    members = {"README": b"hello"}
    for i in range(7):
        key = f"{'long/' * 30}{i:05d}" if i == 3 else f"{i:05d}"
        members |= {f"{key}.jpg": make_image(i), f"{key}.txt": b"caption", f"{key}.json": b"{}"}
    members["lone.json"] = b"{}"
    data = tar_of(list(members.items()), format=format)
    (tmp_path / "a.tar").write_bytes(data)
    chunks = index_tar(open_store(str(tmp_path)), ["a.tar"], rows_per_chunk=3)
    assert [(c.index, c.rows) for c in chunks] == [(0, 3), (1, 3), (2, 1)]
    assert chunks[0].offset == 1024  # after the README
    for before, after in itertools.pairwise(chunks):
        assert before.offset + before.bytes == after.offset
    for chunk in chunks:
        piece = data[chunk.offset : chunk.offset + chunk.bytes]
        assert zlib.crc32(piece) == chunk.crc
        with tarfile.open(fileobj=io.BytesIO(piece)) as tar:  # each chunk is a tar without an end mark
            assert sum(name.endswith(".jpg") for name in tar.getnames()) == chunk.rows


def test_index_tar_refuses_damage(tmp_path):
    store = open_store(str(tmp_path))
    data = tar_of([(f"{i}.{s}", b"x" * 600) for i in range(3) for s in ("jpg", "txt")])
    cases = {"cut": data[:3000], "boundary": data[: 3 * 1536], "header": bytearray(data)}
    cases["header"][1536 * 2 + 3] ^= 1
    for name, damaged in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}\.tar: .*(cut short|damaged)"):
            index_tar(store, [f"{name}.tar"])
    # Two tars, one after the other, lose nothing.
    (tmp_path / "two.tar").write_bytes(data + tar_of([("z.jpg", b"1"), ("z.txt", b"2")]))
    assert sum(c.rows for c in index_tar(store, ["two.tar"], 2)) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_thousand_million_pairs(tmp_path):
    """4 million chunks: seconds and less than 1 GB, in a process of its own."""
    num_chunks, num_shards = 4_000_000, 100_000
    names = pa.array([f"part-{i // 1000:03d}/{i:06d}.parquet" for i in range(num_shards)])
    shard = (np.arange(num_chunks) * num_shards // num_chunks).astype(np.int32)
    columns = {
        "shard": pa.DictionaryArray.from_arrays(shard, names),
        "index": np.arange(num_chunks, dtype=np.int32) % 40,
        "offset": np.arange(num_chunks) % 40 * 7_000_000,
        "bytes": np.full(num_chunks, 7_000_000),
        "rows": np.full(num_chunks, 256, np.int32),
        "crc": np.random.default_rng(0).integers(0, 1 << 32, num_chunks, dtype=np.uint32),
    }
    write_manifest(str(tmp_path), "parquet", pa.table(columns))
    code = (
        "import re, sys, time; from vlmo_ray.data.manifest import load_manifest; start = time.time()\n"
        "m = load_manifest(sys.argv[1]); print(time.time() - start, m.num_rows, len(m.shards))\n"
        # not getrusage: on Linux its peak starts at that of the process that forked this one
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, rows, shards, peak = run.stdout.split()
    assert (int(rows), int(shards)) == (1_024_000_000, num_shards)
    assert float(seconds) < 15
    assert int(peak) * 1024 < 1e9
