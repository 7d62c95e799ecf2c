"""Storage that answers 503, stalls, hangs up in mid-body or is away makes reads and writes slower, and that is all.

When it stays away, or refuses, nothing is masked: that is for what is wrong with a shard itself.
"""

import dataclasses
import hashlib
import re
import threading
import time

import numpy as np
import pytest
from botocore.exceptions import ClientError
from faulty_s3 import faulty_s3

from vlmo_ray.config import DataConfig
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.manifest import Manifest, load_manifest
from vlmo_ray.data.order import Rows
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import ShardError, read_chunk
from vlmo_ray.data.reader import Columns, Reader, Sources, make_part
from vlmo_ray.data.s3 import StorageBusy
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records

pytestmark = pytest.mark.slow


@pytest.fixture
def faults(s3_server, monkeypatch):
    with faulty_s3(s3_server["AWS_ENDPOINT_URL"]) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield faults


def test_reads_and_writes_arrive_whole(faults, bucket, monkeypatch):
    monkeypatch.setattr("vlmo_ray.data.s3._ATTEMPTS", 1)  # so that all retries are those of `Store`,
    monkeypatch.setattr("vlmo_ray.data.store._LONGEST_WAIT_S", 0.1)  # and come soon
    store = Store(bucket, retry_timeout_s=60)
    contents = {f"{i:02d}": hashlib.sha256(b"%d" % i).digest() * (1 + 400 * i) for i in range(8)}
    faults.busy, faults.cut, faults.slow, faults.delay_s = 0.3, 0.3, 0.2, 0.1
    for name, content in contents.items():
        store.write(name, content)
    assert store.sizes() == {name: len(content) for name, content in contents.items()}
    for name, content in contents.items():
        assert store.read(name) == content
        assert store.read(name, 7, 20) == content[7:27]
    store.delete("00")
    assert not store.exists("00")
    assert min(faults.struck[kind] for kind in ("busy", "cut", "slow")) > 2


def test_manifest_and_chunks_are_read_through_an_outage(faults, bucket):
    write_dataset(bucket, records(1, 20, image_size=16), rows_per_group=10)
    faults.away = True
    threading.Timer(1.5, lambda: setattr(faults, "away", False)).start()
    began = time.monotonic()
    manifest = load_manifest(bucket, retry_timeout_s=60)
    assert time.monotonic() - began > 1.4 and faults.struck["away"] > 1
    faults.away, faults.struck["away"] = True, 0
    threading.Timer(1.5, lambda: setattr(faults, "away", False)).start()
    began = time.monotonic()
    assert len(read_chunk(Store(bucket, retry_timeout_s=60), manifest.chunk(1), retries=0)) == 10
    assert time.monotonic() - began > 1.4 and faults.struck["away"] > 1


def test_patience_ends_with_the_address(faults, bucket):
    write_dataset(bucket, records(1, 20, image_size=16), rows_per_group=10)
    chunk = load_manifest(bucket).chunk(0)
    faults.away = True
    with pytest.raises(StorageBusy, match=rf"{bucket}/manifest.parquet: cannot reach .* \(tried for 1 s\)"):
        Store(bucket, retry_timeout_s=1).read("manifest.parquet")
    with pytest.raises(ShardError, match=rf"{bucket}/.*#0: .*\(tried for 1 s\)"):
        read_chunk(Store(bucket, retry_timeout_s=1), chunk)
    faults.away, faults.busy = False, 1.0
    with pytest.raises(StorageBusy, match=r"manifest.parquet: .* is too busy"):
        Store(bucket).read("manifest.parquet")


def test_what_does_not_pass_is_not_waited_for(faults, bucket):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        Store(bucket, retry_timeout_s=60).read("nothing")
    assert time.monotonic() - began < 5


def read_masking(manifest: Manifest, chunk: int) -> Columns:
    """The rows of a chunk, as training has them with `data.bad_shards` "mask"."""
    row = np.arange(manifest.chunk_rows[chunk])
    zero = np.zeros_like(row)
    rows = Rows(step=zero, position=row, epoch=zero, chunk=zero + chunk, row=row)
    sources = Sources((manifest,))
    encoder = MaskedPairs(16, 12, DataConfig(), 30522, 0.15)
    reader = Reader(sources.places, encoder, seed=1, mask_damaged=True, retry_timeout_s=1)
    return reader(make_part(sources, rows))


@pytest.fixture
def ten_a_chunk(faults, bucket, monkeypatch) -> Manifest:
    """Two chunks in one shard, behind the proxy; retries come soon."""
    monkeypatch.setitem(read_chunk.__kwdefaults__, "wait_s", 0.01)
    return write_dataset(bucket, records(1, 20, image_size=16), rows_per_group=10)


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("away", r"cannot reach .* \(tried for 1 s\)"),
        ("busy", r"too busy or out of order .* \(tried for 1 s\)"),
        ("wrong secret", "denies access; check the keys"),
        ("expired token", "the session token has expired"),
        ("no bucket", "neither the shard nor s3://no-such-bucket/data/manifest.parquet exists"),
    ],
)
def test_without_access_nothing_is_masked(ten_a_chunk, faults, monkeypatch, what, sentence):
    manifest = ten_a_chunk
    match what:
        case "away":
            faults.away = True
        case "busy":
            faults.busy = 1.0
        case "wrong secret":
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not this")
        case "expired token":

            def expired(store):
                raise ClientError({"Error": {"Code": "ExpiredToken"}}, "GetObject")

            monkeypatch.setattr(Store, "fs", property(expired))
        case "no bucket":
            manifest = dataclasses.replace(manifest, uri="s3://no-such-bucket/data")
    with pytest.raises(ShardError, match=f"^{manifest.uri}/00000.parquet#1: .*{sentence}"):
        read_masking(manifest, 1)


@pytest.mark.parametrize(
    "what, reason, others",
    [
        ("missing", "the shard does not exist", 0),
        ("flipped byte", "the checksum is wrong", 10),
        ("ends in the chunk", "the shard ends .* bytes before the chunk does", 0),
        ("ends before the chunk", "the shard ends .* bytes before the chunk does", 0),
        ("damaged footer", "Couldn't deserialize thrift", 0),
        ("empty", "the shard ends", 0),
    ],
)
def test_what_is_wrong_with_a_shard_is_masked(ten_a_chunk, what, reason, others):
    store, chunk = Store(ten_a_chunk.uri), ten_a_chunk.chunk(1)
    data = bytearray(store.read(chunk.shard))
    match what:
        case "missing":
            store.delete(chunk.shard)
        case "flipped byte":
            data[chunk.offset + 100] ^= 1
        case "ends in the chunk":
            del data[chunk.offset + 100 :]
        case "ends before the chunk":
            del data[chunk.offset - 100 :]
        case "damaged footer":
            end = chunk.offset + chunk.bytes
            data[end : end + 50] = bytes(range(100, 150))
        case "empty":
            data.clear()
    if what != "missing":
        store.write(chunk.shard, bytes(data))
    columns = read_masking(ten_a_chunk, 1)
    assert not columns["valid"].any()
    for row, (name, problem) in enumerate(zip(columns["id"], columns["problem"], strict=True)):
        assert name == f"{store.uri}/00000.parquet#1:{row}"
        assert re.match(rf"{name}: its chunk is masked: .*({reason})", problem), problem
    assert read_masking(ten_a_chunk, 0)["valid"].sum() == others
