"""Storage that answers 503, stalls, hangs up in mid-body or is away makes reads and writes slower, and that is all."""

import hashlib
import threading
import time

import pytest
from faulty_s3 import faulty_s3

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import ShardError, read_chunk
from vlmo_ray.data.s3 import StorageBusy
from vlmo_ray.data.scenes.records import records
from vlmo_ray.data.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def faults(s3_server, monkeypatch):
    with faulty_s3(s3_server["AWS_ENDPOINT_URL"]) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield faults


def test_reads_and_writes_arrive_whole(faults, bucket):
    store = Store(bucket, patience_s=60)
    contents = {f"{i:02d}": hashlib.sha256(b"%d" % i).digest() * (1 + 400 * i) for i in range(12)}
    faults.busy, faults.cut, faults.slow, faults.delay_s = 0.3, 0.2, 0.2, 0.2
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
    threading.Timer(3, lambda: setattr(faults, "away", False)).start()
    began = time.monotonic()
    manifest = load_manifest(bucket, patience_s=60)
    assert time.monotonic() - began > 2.5 and faults.struck["away"] > 1
    faults.away, faults.struck["away"] = True, 0
    threading.Timer(3, lambda: setattr(faults, "away", False)).start()
    began = time.monotonic()
    assert len(read_chunk(Store(bucket, patience_s=60), manifest.chunk(1), retries=0)) == 10
    assert time.monotonic() - began > 2.5 and faults.struck["away"] > 1


def test_patience_ends_with_the_address(faults, bucket):
    write_dataset(bucket, records(1, 20, image_size=16), rows_per_group=10)
    chunk = load_manifest(bucket).chunk(0)
    faults.away = True
    with pytest.raises(StorageBusy, match=rf"{bucket}/manifest.parquet: cannot reach .* \(tried for 1 s\)"):
        Store(bucket, patience_s=1).read("manifest.parquet")
    with pytest.raises(ShardError, match=rf"{bucket}/.*#0: .*\(tried for 1 s\)"):
        read_chunk(Store(bucket, patience_s=1), chunk)
    faults.away, faults.busy = False, 1.0
    with pytest.raises(StorageBusy, match=r"manifest.parquet: .* is too busy"):
        Store(bucket).read("manifest.parquet")


def test_what_does_not_pass_is_not_waited_for(faults, bucket):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        Store(bucket, patience_s=60).read("nothing")
    assert time.monotonic() - began < 5
