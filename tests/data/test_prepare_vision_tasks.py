"""Readers of segmentation and grounding, and captions that stay together: what is stored, what is refused, and that
training draws captions evenly, as a function of seed, step and position."""

import dataclasses
import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image, small_scenes
from PIL import Image
from small_run import SMALL, job
from sources import put, read_all

from vlmo_ray.config import DataConfig, Phase
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.pairs import MaskedPairs, Pairs, tokenizer
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.ade20k import Ade20k
from vlmo_ray.data.prepare.karpathy import Karpathy
from vlmo_ray.data.prepare.refcoco import RefCoco
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.data.schema import Field, Record, Schema, problem_of
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.retrieval import RetrievalConfig
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(source) -> list[Record]:
    """All records, as another process reads them; the valid ones fit the schema."""
    sent = pickle.loads(pickle.dumps(source))
    records = [record for unit in source.units() for record in sent.records(unit)]
    assert all(record.problem or not problem_of(record, source.schema) for record in records)
    return records


# ---- segmentation ----------------------------------------------------------------------------------------


def png(values, mode: str = "L") -> bytes:
    picture = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        picture.putpalette([7 * i % 256 for i in range(768)])
    file = io.BytesIO()
    picture.convert(mode).save(file, "PNG") if mode != "P" else picture.save(file, "PNG")
    return file.getvalue()


def numbers(mask: bytes) -> list:
    picture = Image.open(io.BytesIO(mask))
    assert (picture.mode, picture.format) == ("L", "PNG")
    return np.asarray(picture).tolist()


GIVEN = [[0, 1, 2], [255, 2, 1]]  # 3 x 2 pixels


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("zero, stored", [("ignore", [[255, 0, 1], [255, 1, 0]]), ("class", [[0, 1, 2], [255, 2, 1]])])
def test_masks_are_stored_as_class_numbers(tmp_path, mode, zero, stored):
    """Of a palette, the indices count."""
    put(str(tmp_path), {"images/training/in/a.jpg": make_image(0, size=(3, 2)), "list.txt": b"wall\n\nsky \nsea\n"})
    put(str(tmp_path), {"annotations/training/in/a.png": png(GIVEN, mode), "images/training/.hidden": b"x"})
    source = Ade20k(str(tmp_path), classes=f"{tmp_path}/list.txt", zero=zero)
    assert source.schema.field("mask") == Field("mask", "mask", ("wall", "sky", "sea"))
    assert Schema.from_json(json.loads(json.dumps(source.schema.to_json()))) == source.schema
    [record] = read(source)
    assert (record.id, record.image_id, record.problem) == ("in/a", "images/training/in/a.jpg", "")
    assert numbers(record.values["mask"]) == stored
    assert record.values["image"] == make_image(0, size=(3, 2))


def test_bad_masks_are_problems_of_their_records(tmp_path):
    size = (3, 2)
    images = {f"images/{name}.jpg": make_image(i, size=size) for i, name in enumerate("abcdef")}
    masks = {
        "a": png(GIVEN),
        "b": png([[0, 3, 1], [1, 1, 1]]),
        "c": png([[0, 1], [1, 1]]),
        "d": png(np.zeros((2, 3, 3))[..., 0], "RGB"),
        "e": png(GIVEN)[:-30],
    }
    put(str(tmp_path), images | {f"annotations/{name}.png": data for name, data in masks.items()})
    put(str(tmp_path), {"images/g.jpg": b"no image", "annotations/g.png": png(GIVEN)})
    records = read(Ade20k(str(tmp_path), split="", classes="2"))
    assert {record.id: record.problem for record in records} == {
        "a": "",
        "b": "the mask has a value that is no class",
        "c": "the image and its mask differ in size",
        "d": "the mask has several channels",
        "e": "the image cannot be decoded",
        "f": "the mask file is missing",
        "g": "the image header is unreadable",
    }
    # two classes are 1 and 2 where 0 is none, but 0 and 1 where it is one
    problems = [record.problem for record in read(Ade20k(str(tmp_path), split="", classes="2", zero="class"))]
    assert problems[0] == "the mask has a value that is no class"


def test_classes_from_every_form(tmp_path):
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t11\t1\twall\n2\t0.1\t6\t6\tbuilding, edifice \n"
    put(str(tmp_path), {"objectInfo150.txt": table.encode(), "objectInfo.csv": b"Idx,Stuff,Name\n1,1,wall\n2,1,a;b\n"})
    put(str(tmp_path), {"cut.txt": (table + "# end of file\n").encode()})
    put(str(tmp_path), {"plain.txt": b"wall, or so\nName\n", "images/val/a.jpg": make_image(0)})
    found = {
        name: Ade20k(str(tmp_path), "val", classes=name if name == "3" else f"{tmp_path}/{name}").schema.field("mask")
        for name in ("objectInfo150.txt", "objectInfo.csv", "plain.txt", "3")
    }
    assert [field.values for field in found.values()] == [
        ("wall", "building, edifice"), ("wall", "a;b"), ("wall, or so", "Name"), ("0", "1", "2"),
    ]  # fmt: skip
    for options, words in (
        ({}, "have no names of classes; give classes=FILE"),
        ({"classes": f"{tmp_path}/cut.txt"}, r"cut\.txt has a line without a Name: '# end of file'"),
        ({"classes": "3"}, r"images/training/ holds no files; name a split by split=\.\.\. \(val\)"),
        ({"classes": "3", "split": "val", "zero": "no"}, "zero='no' is not a choice"),
        ({"classes": "256", "split": "val"}, "the mask 'mask' has 256 classes; use at most 255"),
    ):
        with pytest.raises(UserError, match=words):
            Ade20k(str(tmp_path), **options)


@pytest.mark.skipif(not (SHARED / "ade20k_samples").is_dir(), reason="the samples of ADE20K are not here")
def test_real_masks():
    folder = SHARED / "ade20k_samples"
    source = Ade20k(str(folder), split="", classes=f"{folder}/objectInfo150.csv")
    names = source.schema.field("mask").values
    assert len(names) == 150 and (names[0], names[-1]) == ("wall", "flag")
    records = read(source)
    assert len(records) == 3 and not any(record.problem for record in records)
    for record in records:
        given = np.asarray(Image.open(folder / "annotations" / f"{record.id}.png"))
        stored = np.array(numbers(record.values["mask"]), np.uint8)
        assert (stored == given - 1).all()  # in uint8, 0 - 1 is 255


# ---- grounding -------------------------------------------------------------------------------------------


def ref(i: int, split: str, *texts: str) -> dict:
    sentences = [
        {"raw": text.upper(), "sent": text, "sent_id": 10 * i + k, "tokens": []} for k, text in enumerate(texts)
    ]
    return {"ref_id": i, "ann_id": 100 + i, "image_id": i, "file_name": f"x_{i}_1.jpg", "split": split,
            "sentences": sentences, "category_id": 1}  # fmt: skip


REFS = [ref(1, "train", "the LEFT cat", "a cat"), ref(2, "testA", "man in red"), ref(3, "testB", "lost")]


def refcoco(folder: Path, refs: bytes, name: str = "refs(unc).p") -> str:
    instances = {
        "images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in (1, 2)],
        "annotations": [{"id": 100 + i, "bbox": [i, 0.5, 4, 8]} for i in (1, 2)],
    }
    put(str(folder), {f"refcoco/{name}": refs, "refcoco/instances.json": json.dumps(instances).encode()})
    put(str(folder), {f"train2014/COCO_{i}.jpg": make_image(i) for i in (1, 2)})
    return f"{folder}/refcoco"


# what Python 2 writes for [{"image_id": 2, "ann_id": 102, "split": "testA",
# "sentences": [{"sent_id": 7, "sent": "caf\xe9"}]}]: its strings are bytes
PYTHON_2 = (
    b"\x80\x02]q\x01}q\x02(U\x08image_idq\x03K\x02U\x06ann_idq\x04KfU\x05splitq\x05U\x05testAq\x06"
    b"U\tsentencesq\x07]q\x08}q\t(U\x07sent_idq\nK\x07U\x04sentq\x0bU\x04caf\xe9q\x0cuaua."
)


def test_expressions_and_their_boxes(tmp_path):
    uri = refcoco(tmp_path, pickle.dumps(REFS, protocol=2))
    first, second = read(RefCoco(uri))
    assert [record.id for record in (first, second)] == ["10", "11"]
    assert first.values == {"image": make_image(1), "text": "the LEFT cat", "boxes": [[1.0, 0.5, 5.0, 8.5]]}
    assert (first.forbid, second.forbid, first.image_id) == (("flip",), (), "COCO_1.jpg")
    put(
        str(tmp_path),
        {"dets.json": json.dumps({"2": [[1, 2, 3, 4, 0.9], [3, 3, 0, 2], [0, 0, 5, 6]], "9": []}).encode()},
    )
    source = RefCoco(uri, split="testA+testB", by="unc", images=f"{tmp_path}/train2014", dets=f"{tmp_path}/dets.json")
    assert source.schema.names == ("image", "text", "boxes", "proposals")
    found, lost = read(source)
    assert lost.values["proposals"] == []  # an image without detections
    assert found.values["proposals"] == [[1, 2, 4, 6], [0, 0, 5, 6]] and lost.problem == "there is no image path"
    # without the box of its expression, or without proposals, a record is none
    bad = dataclasses.replace(lost, problem="", image_id="x", values=found.values | {"boxes": None})
    assert problem_of(bad, source.schema) == "there are no boxes"


def test_a_pickle_of_python_2(tmp_path):
    [record] = read(RefCoco(refcoco(tmp_path, PYTHON_2), split="testA"))
    assert (record.id, record.values["text"]) == ("7", "caf\xe9")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_is_refused(tmp_path, protocol):
    marker = tmp_path / "called"
    data = pickle.dumps([*REFS, Call(os.system, f"touch {marker}")], protocol=protocol)
    uri = refcoco(tmp_path, data)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p is not a list of refs: it asks for (posix|os)\.system"):
        RefCoco(uri)
    assert not marker.exists()
    pickle.loads(data)  # which an ordinary reader would have called
    assert marker.exists()


@pytest.mark.parametrize("value", [np.float64(1), Path("x"), Call(dict)])
def test_even_harmless_objects_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"it asks for .*; do not trust this file"):
        RefCoco(refcoco(tmp_path, pickle.dumps([value])))


@pytest.mark.parametrize(
    "refs, options, words",
    [
        (pickle.dumps(REFS)[:-9], {}, "is not a list of refs"),
        (b"", {}, "is not a list of refs"),
        (pickle.dumps([{"image_id": 1, "ann_id": 2}]), {}, "a ref has no 'split'"),
        (pickle.dumps([ref(1, "train") | {"sentences": [{}]}]), {}, "a sentence has no 'sent_id'"),
        (pickle.dumps(REFS), {"split": "val"}, "has no split 'val'; it has testA, testB, train"),
        (pickle.dumps(REFS), {"by": "umd"}, r"by=umd names no file of refs; choose from unc by by=\.\.\."),
        (pickle.dumps(REFS), {"images": "/nowhere"}, "name the image folder"),
        (pickle.dumps(REFS), {"dets": "others.json"}, "has a box in none of the images of train"),
        (pickle.dumps(REFS), {"dets": "list.json"}, "does not hold detected boxes"),
        (pickle.dumps(REFS), {"dets": "short.json"}, r"has a box that is not x, y, width and height: \[1, 2\]"),
    ],
)
def test_mistakes_in_refs_are_named(tmp_path, refs, options, words):
    uri = refcoco(tmp_path, refs)
    put(str(tmp_path), {"list.json": b'[{"image_id": 1, "box": [1, 2, 3, 4]}]', "short.json": b'{"1": [[1, 2]]}'})
    put(str(tmp_path), {"others.json": b'{"1": [[0, 0, 5, 0]], "7": [[1, 2, 3, 4]]}'})
    options = options | ({"dets": f"{tmp_path}/{options['dets']}"} if "dets" in options else {})
    with pytest.raises(UserError, match=words):
        RefCoco(uri, **options)


def test_several_cuts_of_a_set_must_be_chosen_from(tmp_path):
    uri = refcoco(tmp_path, pickle.dumps(REFS))
    refcoco(tmp_path, pickle.dumps(REFS[:1]), "refs(google).p")
    with pytest.raises(UserError, match="choose from google, unc"):
        RefCoco(uri)
    assert len(read(RefCoco(uri, by="google"))) == 2


# ---- captions together -----------------------------------------------------------------------------------


def test_karpathy_keeps_captions_together(tmp_path):
    sentences = [[{"sentid": 7 * i + k, "raw": f"caption {i} {k}"} for k in range(i + 1)] for i in range(3)]
    entries = [{"filename": f"{i}.jpg", "split": "train", "sentences": each} for i, each in enumerate(sentences)]
    put(str(tmp_path), {"dataset_x.json": json.dumps({"images": entries}).encode()})
    put(str(tmp_path), {f"images/{i}.jpg": make_image(i) for i in range(3)})
    source = Karpathy(str(tmp_path), captions="together")
    records = read(source)
    assert [record.id for record in records] == [record.image_id for record in records] == ["0.jpg", "1.jpg", "2.jpg"]
    pairs = read(Karpathy(str(tmp_path)))
    entries.append({"filename": "0.jpg", "split": "val", "sentences": []})
    put(str(tmp_path), {"dataset_x.json": json.dumps({"images": entries}).encode()})
    for captions in ("pairs", "together"):
        source = Karpathy(str(tmp_path), split="val", captions=captions)
        [none] = [record for unit in source.units() for record in source.records(unit)]
        assert problem_of(none, source.schema) in ("the list of captions is empty", "there are no captions")
    assert [(r.image_id, text) for r in records for text in r.values["captions"]] == [
        (record.image_id, record.values["text"]) for record in pairs
    ]
    assert source.units()[0].bytes < Karpathy(str(tmp_path)).units()[0].bytes
    with pytest.raises(UserError, match="captions='all' is not a choice"):
        Karpathy(str(tmp_path), captions="all")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> str:
    """24 small scenes with 1, 2 or 3 captions each, in chunks of 5."""
    folder, texts = str(tmp_path_factory.mktemp("together")), [record["text"] for record in small_scenes(5, 40)]
    rows = [
        {name: value for name, value in record.items() if name in ("id", "image_id", "image", "forbid")}
        | {"captions": texts[i : i + 1 + i % 3]}
        for i, record in enumerate(small_scenes(4, 24))
    ]
    schema = Schema((Field("image", "image"), Field("captions", "captions")))
    write_dataset(folder, rows, rows_per_group=5, groups_per_shard=2, schema=schema)
    return folder


def test_every_caption_is_drawn_about_equally_often():
    encoder, captions = Pairs(8, 12, DataConfig(), captions=True), [f"caption number {word}" for word in "abc"]
    record = Record("r", "i", {"image": make_image(0), "captions": captions})
    assert encoder.fields == ("image", "captions") and Pairs(8, 12, DataConfig()).fields == ("image", "text")
    of = {tuple(tokenizer(12).encode(text)[0]): text for text in captions}

    def drawn(draw: Draw | None) -> str:
        return of[tuple(encoder(record, draw)["text_ids"])]

    assert drawn(None) == captions[0]
    draws = [Draw(3, step, position) for step in range(60) for position in range(5)]
    found = [drawn(draw) for draw in draws]
    assert found == [drawn(draw) for draw in draws] and found != [drawn(dataclasses.replace(d, seed=4)) for d in draws]
    counts = Counter(found)
    assert set(counts) == set(captions) and all(70 < count < 130 for count in counts.values()), counts
    last = dataclasses.replace(record, values=record.values | {"captions": captions[-1:]})
    draw = draws[found.index(captions[-1])]
    assert encoder(record, draw)["text_key"] == encoder(last, None)["text_key"]


def test_a_row_is_that_of_its_place_wherever_it_is_read(together):
    """One row of a part alone equals that row in the whole part, and steps differ."""
    sources = Sources((load_manifest(together),))
    reader = Reader(sources.places, MaskedPairs(16, 12, DataConfig(), 1100, 0.15, captions=True), seed=3)
    whole = whole_chunk(sources, 1)
    columns = reader(whole)
    assert columns["valid"].all()
    for i in reversed(range(len(whole))):
        arrays = {name: getattr(whole, name)[i : i + 1] for name in ("chunk", "row", "step", "position")}
        alone = reader(dataclasses.replace(whole, **arrays))
        for name, values in columns.items():
            np.testing.assert_array_equal(alone[name], values[i : i + 1])
    texts = {tuple(map(int, reader(dataclasses.replace(whole, step=whole.step + s))["text_key"])) for s in range(9)}
    assert len(texts) > 4
    captions = [record.values["captions"] for record in read_all(together)]
    assert max(map(len, captions)) == 3


@pytest.mark.parametrize("task", ["pre-training", "retrieval"])
def test_training_on_captions(together, tmp_path, task):
    config = dataclasses.replace(SMALL, phases=(Phase(2, 8),))
    if task == "retrieval":
        model = dataclasses.replace(SMALL.model, heads=("itc",))
        config = dataclasses.replace(config, model=model, task=RetrievalConfig(itm=0.0))
    assert train(job(together, tmp_path / "run", config)).step == 2
    rows, _ = read_metrics(Store(str(tmp_path / "run")))
    assert all(np.isfinite(row["loss"]) and row["masked_rows"] == 0 for row in rows), rows


def test_an_evaluation_needs_texts(together):
    sources = Sources((load_manifest(together),))
    with pytest.raises(UserError, match="has no column 'text'"):
        Reader(sources.places, Pairs(16, 12, DataConfig()))
