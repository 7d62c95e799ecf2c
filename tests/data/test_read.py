"""Chunks read back as they were written, and everything that is damaged is named by its address."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, make_records
from sources import tar_of

from vlmo_ray.data.index import index_parquet, index_tar
from vlmo_ray.data.manifest import Chunk, Manifest, chunk_table, write_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import DamagedShard, ShardError, read_chunk
from vlmo_ray.data.schema import Record
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError


def read_all(manifest: Manifest) -> list[Record]:
    store = Store(manifest.uri)
    return [r for i in range(manifest.num_chunks) for r in read_chunk(store, manifest.chunk(i), retries=0)]


def fails(chunk: Chunk, uri: str, match: str, **options) -> None:
    with pytest.raises(DamagedShard, match=match) as caught:
        read_chunk(Store(uri), chunk, **{"retries": 0} | options)
    assert str(caught.value).startswith(f"{uri}/{chunk.shard}#{chunk.index}: ")


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_parquet(place, tmp_path, request):
    uri = str(tmp_path / "set") if place == "folder" else request.getfixturevalue("bucket")
    records = make_records(14)
    manifest = write_dataset(uri, records, 4, groups_per_shard=2, forbid=("color",))
    read = read_all(manifest)
    for record, wrote in zip(read, records, strict=True):
        assert (record.id, record.image_id, record.values["text"]) == (wrote["id"], wrote["image_id"], wrote["text"])
        assert record.values["image"] == wrote["image"] and record.problem == ""
        assert record.forbid == (*wrote["forbid"], "color")
    assert read[5].address == f"{uri}/00000.parquet#1:1" and read[9].address == f"{uri}/00001.parquet#0:1"


def test_other_peoples_parquet(tmp_path):
    """Other types and orders of columns, dictionary pages, missing values: read, or said to be wrong."""
    n, bad = 9, b"\xff\xfe"
    table = pa.table(
        {
            "width": list(range(n)),
            "text": pa.array([b"a", bad, None, b" ", *[b"same caption"] * 5], pa.binary()),
            "image": pa.array([make_image(i) for i in range(n - 2)] + [None, b""], pa.large_binary()),
            "image_id": pa.array(["i"] * n, pa.large_string()),
            "id": [f"{i}" for i in range(n - 1)] + [None],
        }
    )
    binary = table["text"].chunk(0)
    text = pa.StringArray.from_buffers(n, *binary.buffers()[1:], binary.buffers()[0])  # unchecked UTF-8
    table = table.set_column(1, "text", text)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4, compression="snappy")
    store = Store(str(tmp_path))
    manifest = write_manifest(store.uri, "parquet", chunk_table(index_parquet(store, ["x.parquet"])))
    read = read_all(manifest)
    assert [r.problem for r in read] == [
        "",
        "the column 'text' is not UTF-8",
        "there is no text",
        "there is no text",
        "",
        "",
        "",
        "there is no image",
        "there is no image",
    ]
    assert read[4].values["text"] == "same caption" and read[4].values["image"] == make_image(4) and read[8].id == ""


def test_a_flipped_byte(tmp_path):
    uri = str(tmp_path)
    manifest = write_dataset(uri, make_records(12), 4)
    path, chunk = tmp_path / "00000.parquet", manifest.chunk(1)
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.bytes // 2] ^= 1
    path.write_bytes(data)
    fails(chunk, uri, "checksum is wrong")
    assert len(read_chunk(Store(uri), manifest.chunk(0))) == 4  # its neighbours are well
    # The pages have checksums of their own, should the manifest have been made from the damaged shard.
    remade = index_parquet(Store(uri), ["00000.parquet"])[1]
    assert remade.crc != chunk.crc
    fails(remade, uri, "CRC|checksum")


def test_missing_cut_and_replaced_shards(tmp_path):
    uri, other = str(tmp_path / "a"), str(tmp_path / "b")
    manifest = write_dataset(uri, make_records(12), 4)
    path, last = tmp_path / "a" / "00000.parquet", manifest.chunk(2)
    path.write_bytes(path.read_bytes()[: last.offset + 10])
    fails(last, uri, "ends .* bytes before the chunk")
    write_dataset(other, make_records(12, first=100), 5)
    path.write_bytes((tmp_path / "b" / "00000.parquet").read_bytes())
    fails(last, uri, "checksum|bytes before")
    path.unlink()
    fails(last, uri, "does not exist", retries=9)  # at once: waiting brings nothing


def test_a_passing_fault_is_tried_again(tmp_path, monkeypatch):
    uri = str(tmp_path)
    chunk = write_dataset(uri, make_records(3)).chunk(0)
    calls, patiently = [], Store.patiently

    def flaky(self, *args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("503 slow down")
        data = patiently(self, *args)
        return data[:-1] + bytes([data[-1] ^ 1]) if len(calls) == 2 else data

    monkeypatch.setattr(Store, "patiently", flaky)
    assert len(read_chunk(Store(uri), chunk, retries=2, wait_s=0.001)) == 3
    calls.clear()
    fails(chunk, uri, r"checksum is wrong.* \(tried 2 times\)", retries=1, wait_s=0.001)


def test_damaged_footers(tmp_path):
    uri = str(tmp_path)
    manifest = write_dataset(uri, make_records(12), 4)
    path, chunk = tmp_path / "00000.parquet", manifest.chunk(2)
    data = path.read_bytes()
    begin = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    size = (1 << 31).to_bytes(4, "little")
    for damaged in (data[:begin], data[:-1], data[:-8] + size + data[-4:], data[:begin] + data[begin + 9 :]):
        path.write_bytes(damaged)
        fails(chunk, uri, "Parquet|thrift|footer")


def test_a_footer_longer_than_is_read_at_first(tmp_path, monkeypatch):
    manifest = write_dataset(str(tmp_path), make_records(12), 4)
    monkeypatch.setattr("vlmo_ray.data.read._TAIL_BYTES", 100)
    assert len(read_all(manifest)) == 12


def test_no_access_is_no_damage(tmp_path, monkeypatch):
    def refused(message: str) -> None:
        with pytest.raises(ShardError, match=message) as caught:
            read_chunk(store, chunk, retries=1, wait_s=0.001)
        assert not isinstance(caught.value, DamagedShard)
        assert str(caught.value).startswith(f"{store.uri}/00000.parquet#0: ")

    store = Store(str(tmp_path / "set"))
    chunk = write_dataset(store.uri, make_records(3)).chunk(0)
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    refused(f"neither the shard nor {store.uri}/manifest.parquet exists")
    (tmp_path / "set").mkdir()  # a mount point
    refused("check the bucket or the mount")

    def expired(self, *args):
        raise UserError("the session token has expired")

    monkeypatch.setattr(Store, "patiently", expired)
    refused(r"token has expired \(tried 2 times\)")


def test_webdataset(tmp_path):
    facts = {"id": 7, "image_id": "shared", "forbid": ["flip"], "caption": "not this"}
    members = [
        ("0.jpg", make_image(0)),
        ("0.txt", b"plain"),
        ("d/1.v2.JPG", make_image(9)),  # the suffix is v2.jpg, which is not an image's
        ("d/1.PNG", make_image(1, "PNG")),
        ("d/1.json", json.dumps(facts).encode()),
        ("d/1.txt", b"with facts"),
        ("2.webp", make_image(2, "WEBP")),
        ("2.json", b'{"caption": "from the JSON"}'),
        ("3.jpg", make_image(3)),
        ("4.txt", b"no image"),
        ("5.jpg", make_image(5)),
        ("5.txt", b"\xff\xfe"),
        ("6.jpg", make_image(6)),
        ("6.txt", b"ok"),
        ("6.json", b"[not json"),
        ("7.jpg", make_image(7)),
        ("7.txt", b"ok"),
        ("7.json", b'{"forbid": ["spin"]}'),
        ("8.jpg", make_image(8)),
        ("8.json", b'{"caption": "half a pair \\ud800", "image_id": "\\udfff"}'),
    ]
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    store = Store(str(tmp_path))
    chunks = index_tar(store, ["s.tar"], rows_per_chunk=3)
    read = read_all(write_manifest(store.uri, "webdataset", chunk_table(chunks), forbid=("color",)))
    assert [r.id for r in read] == ["s.tar/0", "7", *(f"s.tar/{i}" for i in range(2, 9))]
    assert read[1].image_id == "shared" and read[0].image_id == "s.tar/0"
    assert [r.values["text"] for r in read[:3]] == ["plain", "with facts", "from the JSON"]
    assert [r.values["image"] for r in read[:3]] == [make_image(0), make_image(1, "PNG"), make_image(2, "WEBP")]
    assert read[0].forbid == ("color",) and read[1].forbid == ("flip", "color")
    assert [r.problem for r in read[:3]] == ["", "", ""]
    expected = [
        "no text",
        "no image",
        "not UTF-8",
        ".json member cannot be read",
        "forbid has a value other than crop, flip",
        "Unicode",
    ]
    assert all(want in r.problem for want, r in zip(expected, read[3:], strict=True)), read[3:]
    assert read[4].address == f"{tmp_path}/s.tar#1:1"


def test_member_names_never_reach_the_disk(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    names = ["../up", "/absolute/x", "a/../../b", "..", "c\nd"]
    members = [(f"{n}.{s}", make_image(0) if s == "jpg" else b"t") for n in names for s in ("jpg", "txt")]
    (folder / "s.tar").write_bytes(tar_of(members))
    before = sorted(tmp_path.rglob("*"))
    store = Store(str(folder))
    (chunk,) = index_tar(store, ["s.tar"])
    read = read_chunk(store, chunk)
    assert {"s.tar/../up", "s.tar//absolute/x"} <= {r.id for r in read}
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_tar(tmp_path):
    members = [(f"{i}.{s}", make_image(i) if s == "jpg" else b"t") for i in range(6) for s in ("jpg", "txt")]
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    store, path = Store(str(tmp_path)), tmp_path / "s.tar"
    first, second = index_tar(store, ["s.tar"], rows_per_chunk=3)
    data = path.read_bytes()
    path.write_bytes(data[: second.offset + 700])
    fails(second, store.uri, "ends .* bytes before the chunk")
    assert len(read_chunk(store, first)) == 3
    flipped = bytearray(data)
    flipped[second.offset + 600] ^= 1
    path.write_bytes(flipped)
    fails(second, store.uri, "checksum is wrong")
