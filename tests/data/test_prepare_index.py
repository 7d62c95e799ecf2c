"""Indexing adds a manifest beside shards that are there, and touches nothing else."""

from __future__ import annotations

import pytest
from conftest import make_records
from sources import files, ids, put, read_all, tars

from vlmo_ray.data.manifest import MANIFEST, load_manifest
from vlmo_ray.data.prepare import Counts, prepare
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_index_in_place(ray_cluster, places, format):
    source, _ = places
    if format == "webdataset":
        put(source, tars(3, 10))
    else:
        write_dataset(source, make_records(30), 4, groups_per_shard=3)
        Store(source).delete(MANIFEST)
    before = {name: Store(source).read(name) for name in Store(source).list()}
    counts = prepare(format, source, index=True, rows_per_group=4, forbid=("crop",))
    assert counts == Counts(30, 30)
    after = {name: Store(source).read(name) for name in Store(source).list()}
    assert set(after) - set(before) == {MANIFEST, "prepare.json"}
    assert {name: after[name] for name in before} == before
    order = ids(source)
    if format == "webdataset":
        assert order == [f"{t:03d}.tar/{i:04d}" for t in range(3) for i in range(10)]
        assert load_manifest(source).chunk_rows.tolist() == [4, 4, 2] * 3
    else:
        assert order == [f"pair-{i}" for i in range(30)]
    assert read_all(source)[1].forbid == ("crop",)
    assert prepare(format, source, index=True, rows_per_group=4, forbid=("crop",)) == counts
    with pytest.raises(UserError, match="rows_per_group was 4, is now 5"):
        prepare(format, source, index=True, rows_per_group=5, forbid=("crop",))
    with pytest.raises(UserError, match="leave out"):
        prepare(format, source, f"{source}-other", index=True)


def test_indexing_leaves_other_peoples_files_alone(ray_cluster, tmp_path, monkeypatch):
    source = str(tmp_path)
    own = {"_work/notes.txt": b"mine", "_work/x.tar": tars(1, 2)["000.tar"], "dropped.jsonl": b"mine too"}
    put(source, tars(1, 3) | own)
    assert prepare("webdataset", source, index=True) == Counts(5, 5)
    after = files(tmp_path)
    assert own.items() <= after.items() and "_work/x.tar/0001" in ids(source)

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            prepare("webdataset", source, index=True)
        assert f"delete {source}" not in str(caught.value) and "delete it" not in str(caught.value)
        assert own.items() <= files(tmp_path).items()

    put(source, {"001.tar": tars(1, 3)["000.tar"]})
    refused(r"the source has changed\); delete prepare\.json and manifest\.parquet there")
    for broken in (b"[1]", b"{"):
        put(source, {"prepare.json": broken})
        refused(r"prepare\.json that cannot be read; delete prepare\.json and manifest\.parquet")
    Store(source).delete("prepare.json")
    refused(r"manifest\.parquet is in the way.* move it")
    Store(source).delete(MANIFEST)
    put(source, {f"{WORK}/theirs": b"x"})
    refused(r"theirs is in the way")
    Store(source).delete_folder(WORK)
    assert prepare("webdataset", source, index=True).kept == 8
