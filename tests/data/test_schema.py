"""Schemas say what is stored; every kind of value has its valid and invalid ones; nothing undeclared is written."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, make_records
from hypothesis import given
from hypothesis import strategies as st
from sources import put, read_all, tar_of

from vlmo_ray.data.index import index_parquet, index_tar, stored_schema
from vlmo_ray.data.manifest import MANIFEST, chunk_table, load_manifest, write_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import DamagedShard, read_chunk
from vlmo_ray.data.schema import FORBID, PAIRS, Field, Record, Schema, problem_of
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

EVERYTHING = Schema(
    (
        Field("image", "image"),
        Field("image_2", "image"),
        Field("mask", "mask"),
        Field("text", "text"),
        Field("label", "label", ("cat", "dog", "eel")),
        Field("answers", "answers", ("yes", "no")),
        Field("captions", "captions"),
        Field("boxes", "boxes"),
    )
)


def good(i: int = 0) -> dict:
    return {
        "id": f"r{i}",
        "image_id": f"i{i}",
        "image": make_image(i),
        "image_2": make_image(i + 100),
        "mask": make_image(i + 200, "PNG"),
        "text": f"text {i} \N{SNOWMAN}",
        "label": i % 3,
        "answers": [{"answer": "yes", "score": 1.0}, {"answer": "no", "score": 0.25}][: i % 3],
        "captions": [f"caption {i} {k}" for k in range(1 + i % 2)],
        "boxes": [[0.0, 0.5, 4.0 + i, 8.0 + k] for k in range(i % 4)],
        "forbid": ["flip"] if i % 2 else [],
    }


def as_record(row: dict) -> Record:
    values = {name: value for name, value in row.items() if name in EVERYTHING}
    return Record(row["id"], row["image_id"], values, tuple(row["forbid"]))


def test_arrow_and_json():
    assert PAIRS.names == ("image", "text") and "text" in PAIRS and "label" not in PAIRS
    assert PAIRS.arrow == pa.schema(
        {
            "id": pa.string(),
            "image_id": pa.string(),
            "image": pa.binary(),
            "text": pa.string(),
            "forbid": pa.list_(pa.string()),
        }
    )
    assert Schema.from_json(json.loads(json.dumps(EVERYTHING.to_json()))) == EVERYTHING
    assert pickle.loads(pickle.dumps(EVERYTHING)) == EVERYTHING and hash(EVERYTHING) != hash(PAIRS)
    assert EVERYTHING.field("label").values == ("cat", "dog", "eel")
    with pytest.raises(UserError, match="no column 'sound'; it has image, image_2"):
        EVERYTHING.field("sound")


def test_parse():
    parsed = Schema.parse("image, image_2,question:text,label")
    assert [(f.name, f.kind) for f in parsed.fields] == [
        ("image", "image"),
        ("image_2", "image"),
        ("question", "text"),
        ("label", "label"),
    ]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Schema.parse("image,sound"), "'sound' is not a kind of column; choose from image"),
        (lambda: Schema.parse("image,"), "not a kind"),
        (lambda: Schema.parse("image,image"), "'image' is declared twice"),
        (lambda: Field("forbid", "text"), "'forbid' cannot name a column"),
        (lambda: Field("_order", "text"), "cannot name a column"),
        (lambda: Field("text", "text", ("a",)), "'text', which has no list of values"),
        (lambda: Field("label", "label", ("a", "b", "a")), "value 'a' twice"),
        (lambda: Schema(()), "at least one column"),
    ],
)
def test_schemas_that_cannot_be(make, words):
    with pytest.raises(UserError, match=words):
        make()


BAD = [
    ("id", "", "there is no id"),
    ("image_id", "", "there is no id or no image_id"),
    ("id", "half \ud800", "an id is not valid Unicode"),
    ("forbid", ["spin"], "forbid has a value other than crop"),
    ("image", b"", "there is no image"),
    ("image_2", "a path", "the image_2 is not bytes"),
    ("mask", None, "there is no mask"),
    ("text", " \n", "there is no text"),
    ("text", 3, "the text is not a string"),
    ("text", "\udfff", "the text is not valid Unicode"),
    ("label", -1, "the label is not the number of a class"),
    ("label", 3, "the label is not the number of a class"),
    ("label", 1.0, "the label is not an integer"),
    ("label", True, "the label is not an integer"),
    ("answers", None, "there are no answers"),
    ("answers", "yes", "the answers are not a list"),
    ("answers", ["yes"], "not an answer and a score"),
    ("answers", [{"answer": "yes"}], "not an answer and a score"),
    ("answers", [{"answer": "maybe", "score": 1.0}], "an answer in answers is not one of the values"),
    ("answers", [{"answer": "", "score": 1.0}], "there is no answer in answers"),
    ("answers", [{"answer": "yes", "score": 1.5}], "a score in answers is not between 0 and 1"),
    ("answers", [{"answer": "yes", "score": math.nan}], "a score in answers is not between 0 and 1"),
    ("answers", [{"answer": "yes", "score": None}], "a score in answers is not between 0 and 1"),
    ("captions", [], "there are no captions"),
    ("captions", "one", "the captions are not a list"),
    ("captions", ["one", " "], "there is no text in captions"),
    ("captions", ["one", None], "there is no text in captions"),
    ("boxes", 5, "the boxes are not a list"),
    ("boxes", [[0, 0, 1]], "boxes has a value that is not a box"),
    ("boxes", [[1, 0, 1, 1]], "boxes has a value that is not a box"),
    ("boxes", [[0, 2, 1, 1]], "boxes has a value that is not a box"),
    ("boxes", [[0, 0, math.inf, 1]], "boxes has a value that is not a box"),
    ("boxes", [[0, 0, 1, math.nan]], "boxes has a value that is not a box"),
    ("boxes", [[0, 0, 1e60, 1]], "boxes has a value that is not a box"),
    ("boxes", [[1, 0, 1 + 1e-12, 1]], "boxes has a value that is not a box"),
    ("boxes", [[0, 0, 1, "x"]], "boxes has a value that is not a box"),
    ("boxes", [None], "boxes has a value that is not a box"),
]


@pytest.mark.parametrize("name, value, problem", BAD)
def test_invalid_values(name, value, problem, tmp_path):
    row = good(5)
    assert problem_of(as_record(row), EVERYTHING) == ""
    row[name] = value
    found = problem_of(as_record(row), EVERYTHING)
    assert problem in found, found
    if name in EVERYTHING:
        others = [other for other in EVERYTHING.names if other != name]
        assert problem_of(as_record(row), EVERYTHING, [name]) == found
        assert problem_of(as_record(row), EVERYTHING, others) == ""
    with pytest.raises(UserError, match=r"^record 1 \(.*\): "):
        write_dataset(str(tmp_path), [good(0), row], schema=EVERYTHING)
    assert list(tmp_path.iterdir()) == []


def test_image_id_is_for_images_and_a_problem_stays():
    schema = Schema((Field("text", "text"),))
    assert problem_of(Record("a", "", {"text": "t"}), schema) == ""
    assert problem_of(Record("a", "", {"text": "t"}, problem="lost"), schema) == "lost"
    assert problem_of(Record("a", "", {}), schema) == "there is no text"
    assert problem_of(Record("a", "", {"text": "t"}, forbid=FORBID), schema) == ""


@given(st.integers(-(2**40), 2**40), st.integers(0, 5))
def test_labels(label, num_classes):
    schema = Schema((Field("label", "label", tuple(map(str, range(num_classes)))),))
    valid = 0 <= label < (num_classes or 2**31)
    for value in (label, np.int64(label)):
        assert (problem_of(Record("a", "", {"label": value}), schema) == "") == valid


number = st.floats(width=32) | st.integers(-5, 5)


@given(st.lists(st.lists(number, min_size=3, max_size=5), max_size=3))
def test_boxes(boxes):
    schema = Schema((Field("boxes", "boxes"),))
    valid = all(len(b) == 4 and all(map(math.isfinite, b)) and b[0] < b[2] and b[1] < b[3] for b in boxes)
    assert (problem_of(Record("a", "", {"boxes": boxes}), schema) == "") == valid


# ---- from a record to storage and back -----------------------------------------------------------------


def test_every_kind_comes_back(tmp_path):
    rows = [good(i) for i in range(13)]
    written = write_dataset(str(tmp_path), rows, 4, groups_per_shard=2, schema=EVERYTHING)
    loaded = load_manifest(str(tmp_path))
    assert loaded.schema == EVERYTHING and loaded.fingerprint == written.fingerprint
    for record, row in zip(read_all(str(tmp_path)), rows, strict=True):
        assert (record.id, record.image_id, list(record.forbid)) == (row["id"], row["image_id"], row["forbid"])
        assert record.values == {name: row[name] for name in EVERYTHING.names}
    footer = pq.read_metadata(tmp_path / "00000.parquet").row_group(0)
    compression = {footer.column(i).path_in_schema: footer.column(i).compression for i in range(footer.num_columns)}
    for name in ("image", "image_2", "mask"):
        assert compression.pop(name) == "UNCOMPRESSED"
    assert set(compression.values()) == {"ZSTD"} and len(compression) == 9


def test_only_the_asked_fields_are_read_and_judged(tmp_path):
    manifest = write_dataset(str(tmp_path), [good(i) for i in range(3)], schema=EVERYTHING)
    store, chunk = Store(str(tmp_path)), manifest.chunk(0)
    for names in ((), ("label",), ["boxes", "text"]):
        for i, record in enumerate(read_chunk(store, chunk, EVERYTHING, names)):
            assert record.values == {name: good(i)[name] for name in names} and record.id == f"r{i}"
    with pytest.raises(DamagedShard, match="no column 'sound'"):
        read_chunk(store, chunk, Schema((*EVERYTHING.fields, Field("sound", "text"))), retries=0)


def test_the_fingerprint_knows_the_schema(tmp_path):
    def fingerprint(place: str, label: Field) -> str:
        schema = Schema((Field("image", "image"), label))
        rows = [{"id": f"{i}", "image_id": "i", "image": make_image(i), label.name: i % 3} for i in range(5)]
        return write_dataset(str(tmp_path / place), rows, schema=schema).fingerprint

    label = Field("label", "label", ("a", "b", "c"))
    first = fingerprint("a", label)
    assert first == fingerprint("b", label)
    others = Field("label", "label", ("a", "c", "b")), Field("label", "label"), Field("number", "label")
    assert len({first, *map(fingerprint, "cde", others)}) == 4


def test_bytes_that_are_no_utf_8_at_any_depth(tmp_path):
    bad = pa.array([b"fine", b"\xff", b"also fine"], pa.binary())
    text = pa.StringArray.from_buffers(3, *bad.buffers()[1:], bad.buffers()[0])
    scores = pa.array([0.5, 0.5, 0.5], pa.float32())
    struct = pa.StructArray.from_arrays([text, scores], ["answer", "score"])
    columns = {
        "id": pa.array(["0", "1", "2"]),
        "image_id": pa.array(["", "", ""]),
        "captions": pa.ListArray.from_arrays([0, 1, 2, 3], text),
        "answers": pa.ListArray.from_arrays([0, 1, 2, 3], struct),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    store = Store(str(tmp_path))
    for name in ("captions", "answers"):
        schema = Schema.parse(name)
        (chunk,) = index_parquet(store, ["x.parquet"], schema)
        problems = [record.problem for record in read_chunk(store, chunk, schema)]
        assert problems == ["", f"the column {name!r} is not UTF-8", ""]


def test_undeclared_columns_are_refused(tmp_path):
    rows = [record | {"answer": "yes"} for record in make_records(3)]
    with pytest.raises(UserError, match=r"'answer' is not declared.*the schema has image, text; declare it"):
        write_dataset(str(tmp_path), rows)
    assert list(tmp_path.iterdir()) == []
    late = [*make_records(3), rows[0] | {"id": "late"}]
    with pytest.raises(UserError, match="'answer' is not declared"):
        write_dataset(str(tmp_path), late, rows_per_group=1, groups_per_shard=1)
    assert not (tmp_path / MANIFEST).exists()


def test_shards_state_their_schema(tmp_path):
    write_dataset(str(tmp_path), [good(0)], schema=EVERYTHING)
    store = Store(str(tmp_path))
    assert stored_schema(store, "00000.parquet") == EVERYTHING
    assert len(index_parquet(store, ["00000.parquet"], EVERYTHING)) == 1
    assert len(index_parquet(store, ["00000.parquet"])) == 1  # a pair is part of it
    pq.write_table(pa.Table.from_pylist(make_records(2)), tmp_path / "others.parquet")
    assert stored_schema(store, "others.parquet") == PAIRS
    other = dataclasses.replace(EVERYTHING.field("label"), values=("dog", "cat", "eel"))
    with pytest.raises(UserError, match=r"00000\.parquet states the column 'label' as label of 3 values \(cat"):
        index_parquet(store, ["00000.parquet"], Schema((other,)))
    with pytest.raises(UserError, match="the column 'image_2' is missing, not binary"):
        index_parquet(store, ["others.parquet"], EVERYTHING)


def test_tars_with_other_columns(tmp_path):
    schema = Schema.parse("image,mask,label,captions,boxes")
    facts = {"captions": ["a", "b"], "boxes": [[0, 0, 1, 2]], "label": 4}
    members = {
        "0.jpg": make_image(0),
        "0.mask.png": make_image(1, "PNG"),
        "0.cls": b"7\n",
        "0.json": json.dumps(facts).encode(),
        "1.jpg": make_image(2),
        "1.mask.png": make_image(3, "PNG"),
        "1.json": json.dumps(facts).encode(),
        "2.jpg": make_image(4),
        "2.cls": b"seven",
        "2.mask.png": make_image(5, "PNG"),
        "2.json": json.dumps(facts).encode(),
        "3.jpg": make_image(6),
    }
    put(str(tmp_path), {"a.tar": tar_of(list(members.items()))})
    store = Store(str(tmp_path))
    chunks = index_tar(store, ["a.tar"], schema=schema)
    write_manifest(store.uri, "webdataset", chunk_table(chunks), schema=schema)
    manifest = load_manifest(store.uri)
    assert manifest.schema == schema
    first, second, third, fourth = read_chunk(store, manifest.chunk(0), schema)
    boxes = {"captions": ["a", "b"], "boxes": [[0, 0, 1, 2]]}
    assert first.values == {"image": make_image(0), "mask": make_image(1, "PNG"), "label": 7} | boxes
    assert second.values["label"] == 4 and first.problem == second.problem == ""
    assert third.problem == "the .cls member is not an integer" and fourth.problem == "there is no mask"
    assert read_chunk(store, manifest.chunk(0), schema, ["image"])[3].problem == ""


def test_a_tar_without_plain_images_has_records_by_its_columns(tmp_path):
    members = [("0.left.png", make_image(0, "PNG")), ("0.cls", b"1"), ("1.cls", b"2"), ("2.json", b"{}")]
    put(str(tmp_path), {"a.tar": tar_of(members)})
    store, schema = Store(str(tmp_path)), Schema.parse("left:image,label")
    assert [chunk.rows for chunk in index_tar(store, ["a.tar"], schema=schema)] == [2]
    assert index_tar(store, ["a.tar"]) == []
    (chunk,) = index_tar(store, ["a.tar"], schema=schema)
    first, second = read_chunk(store, chunk, schema)
    assert first.values == {"left": make_image(0, "PNG"), "label": 1} and first.problem == ""
    assert second.problem == "there is no left"
