"""Sources with other columns than pairs: folders of classes, tars and Parquet that declare more; and refusals."""

from __future__ import annotations

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import make_image
from sources import dropped, put, read_all, tar_of

from vlmo_ray.data import prepare as package
from vlmo_ray.data.manifest import MANIFEST, load_manifest
from vlmo_ray.data.prepare import Counts, prepare
from vlmo_ray.data.prepare.folders import Folders
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.prepare.source import WorkUnit
from vlmo_ray.data.schema import PAIRS, Field, Record, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PICTURES = {
    "dog/2.jpg": make_image(2),
    "dog/deep/er/0.png": make_image(0, "PNG"),
    "cat/1.jpg": make_image(1),
    "eel/notes.txt": b"no image",
    "cat/.DS_Store": b"hidden",
    ".cache/dog/1.jpg": make_image(3),
    "stray.jpg": make_image(4),
}


def test_classes_are_the_sorted_folders(places, monkeypatch):
    """Without Ray: what the source says of itself, and its records."""
    place, _ = places
    put(place, PICTURES)
    monkeypatch.setattr("vlmo_ray.data.prepare.source.UNIT_BYTES", 2000)
    source = Folders(place)
    assert source.schema == Schema((Field("image", "image"), Field("label", "label", ("cat", "dog", "eel"))))
    units = source.units()
    assert len(units) > 1 and sum(unit.bytes for unit in units) >= 4 * 500
    records = {record.id: record for unit in units for record in source.records(unit)}
    labels = {id: record.values["label"] for id, record in records.items()}
    assert labels == {"cat/1.jpg": 0, "dog/2.jpg": 1, "dog/deep/er/0.png": 1, "eel/notes.txt": 2, "stray.jpg": None}
    assert records["dog/2.jpg"].image_id == "dog/2.jpg" and records["dog/2.jpg"].values["image"] == make_image(2)
    assert records["stray.jpg"].problem == "the file lies in no folder of a class"
    listing = source.listing
    put(place, {"dog/3.jpg": make_image(3)})
    assert Folders(place).listing != listing


def test_a_list_of_classes_fixes_their_order(places, tmp_path):
    place, _ = places
    put(place, PICTURES)
    put(
        str(tmp_path / "lists"),
        {"all": b"eel\nempty\n\ndog\ncat\n", "few": b"dog\ncat\n", "twice": b"dog\ndog\neel\ncat\n"},
    )
    source = Folders(place, classes=str(tmp_path / "lists" / "all"))
    assert source.schema.field("label").values == ("eel", "empty", "dog", "cat")
    labels = {r.id: r.values["label"] for unit in source.units() for r in source.records(unit)}
    assert labels["cat/1.jpg"] == 3 and labels["dog/2.jpg"] == 2
    for name, words in {
        "few": "eel is not a class in .*few; add a line",
        "twice": "'dog' twice",
        "none": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words):
            Folders(place, classes=str(tmp_path / "lists" / name))
    with pytest.raises(UserError, match="holds no folder with files"):
        Folders(str(tmp_path / "lists"))


@pytest.mark.ray
def test_folders(ray_cluster, places):
    source, out = places
    put(source, PICTURES)
    reasons = {"the file lies in no folder of a class": 1, "the image header is unreadable": 1}
    assert prepare("folders", source, out) == Counts(5, 3, reasons)
    read = {record.id: record.values for record in read_all(out)}
    assert read == {
        "cat/1.jpg": {"image": make_image(1), "label": 0},
        "dog/2.jpg": {"image": make_image(2), "label": 1},
        "dog/deep/er/0.png": {"image": make_image(0, "PNG"), "label": 1},
    }
    assert load_manifest(out).schema == Folders(source).schema
    assert {f"{source}/stray.jpg", f"{source}/eel/notes.txt"} == {entry["address"] for entry in dropped(out)}
    assert prepare("folders", source, out) == Counts(5, 3, reasons)  # finished: the counts again
    with pytest.raises(UserError, match="only parquet and webdataset sources can be indexed"):
        prepare("folders", source, index=True)


LABELLED = [
    ("0.jpg", make_image(0)),
    ("0.cls", b"1"),
    ("1.jpg", make_image(1)),
    ("1.cls", b"0"),
    ("2.jpg", make_image(2)),
    ("2.cls", b"none"),
    ("3.jpg", make_image(3)),
]


@pytest.mark.ray
def test_tars_with_labels(ray_cluster, places):
    source, out = places
    put(source, {"a.tar": tar_of(LABELLED)})
    reasons = {"the .cls member is not an integer": 1, "there is no label": 1}
    assert prepare("webdataset", source, out, columns="image,label") == Counts(4, 2, reasons)
    assert {r.id: r.values["label"] for r in read_all(out)} == {"a.tar/0": 1, "a.tar/1": 0}
    with pytest.raises(UserError, match=r"no record .* is left(?s:.*)4: there is no text"):
        prepare("webdataset", source, f"{out}2")
    assert prepare("webdataset", source, index=True, columns="image,label") == Counts(4, 4)
    assert load_manifest(source).schema == Schema.parse("image,label")


@pytest.mark.ray
def test_parquet_with_other_columns(ray_cluster, places):
    source, out = places
    images = [{"bytes": make_image(i), "path": None} for i in range(3)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [4, 0, -1], "more": ["x"] * 3}), file)
    put(source, {"a.parquet": file.getvalue()})
    counts = prepare("parquet", source, out, columns="image,label")
    assert counts == Counts(3, 2, {"the label is not the number of a class": 1})
    read = {record.id: record.values for record in read_all(out)}
    assert read == {f"a.parquet:{i}": {"image": make_image(i), "label": 4 - 4 * i} for i in range(2)}
    with pytest.raises(UserError, match=r"has no boxes column boxes; it has image, label, more; .*columns="):
        prepare("parquet", source, f"{out}2", columns="image,boxes")


@pytest.mark.ray
def test_our_own_shards_keep_their_columns(ray_cluster, places):
    """Prepared again, and indexed in place."""
    source, out = places
    schema = Schema((Field("image", "image"), Field("answers", "answers", ("yes", "no"))))
    rows = [
        {"id": f"{i}", "image_id": "i", "image": make_image(i), "answers": [{"answer": "no", "score": i / 4}]}
        for i in range(5)
    ]
    fingerprint = write_dataset(source, rows, 2, schema=schema).fingerprint
    assert prepare("parquet", source, out) == Counts(5, 5)
    assert load_manifest(out).schema == schema
    assert sorted((r.id, r.values["answers"]) for r in read_all(out)) == [(r["id"], r["answers"]) for r in rows]
    Store(source).delete(MANIFEST)
    assert prepare("parquet", source, index=True) == Counts(5, 5)
    assert load_manifest(source).fingerprint == fingerprint


class Undeclared:
    """A source with a column more than it says."""

    format, schema, listing, versions, uri = "undeclared", PAIRS, "", "", "made up"
    image = make_image(0)  # not in `records`: other processes do not find conftest

    def units(self) -> list[WorkUnit]:
        return [WorkUnit("all", 1000)]

    def records(self, unit: WorkUnit):
        values = {"image": self.image, "text": "a", "answer": "yes"}
        yield Record("0", "0", values, address="at 0")


@pytest.mark.ray
def test_undeclared_columns_are_refused(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "FORMATS", {"undeclared": lambda uri: Undeclared()})
    with pytest.raises(UserError, match="'answer' is not declared"):
        prepare("undeclared", "made up", str(tmp_path / "out"))
    assert Store(str(tmp_path / "out")).list() == ["prepare.json"]


@pytest.mark.ray
def test_a_finished_preparation_from_before_schemas_is_finished(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, {"a.tar": tar_of([("0.jpg", make_image(0)), ("0.txt", b"a")])})
    assert prepare("webdataset", source, out) == Counts(1, 1)
    state = json.loads(Store(out).read("prepare.json")) | {"version": 1}
    del state["schema"]
    put(out, {"prepare.json": json.dumps(state).encode()})
    assert prepare("webdataset", source, out) == Counts(1, 1)
    state["version"] = 1
    del state["counts"]
    put(out, {"prepare.json": json.dumps(state).encode()})
    with pytest.raises(UserError, match="version was 1, is now 3"):
        prepare("webdataset", source, out)


def test_formats_are_found_by_name():
    named = ["ade20k", "folders", "karpathy", "nlvr2", "parquet", "refcoco", "snli_ve", "table", "text", "vqa"]
    assert sorted(package.FORMATS) == [*named, "webdataset"]
    assert package.FORMATS["folders"] is Folders
