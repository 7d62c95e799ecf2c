"""Readers of the fine-tuning tasks: the official files, and what each kind of mistake in them gives."""

import json

import pytest
from conftest import make_image, make_records
from sources import put

from vlmo_ray.data.prepare.entries import names_sides
from vlmo_ray.data.prepare.nlvr2 import Nlvr2
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.prepare.snli_ve import SnliVe
from vlmo_ray.data.prepare.vqa import Vqa
from vlmo_ray.data.schema import problem_of
from vlmo_ray.errors import UserError


def read(source) -> list:
    """All records; the valid ones fit the schema."""
    records = [record for unit in source.units() for record in source.records(unit)]
    assert all(record.problem or not problem_of(record, source.schema) for record in records)
    return records


def question(i: int, text: str = "what is it?") -> dict:
    return {"question_id": 10 * i, "image_id": i, "question": text}


def annotation(i: int, *answers: str) -> dict:
    given = [{"answer": answer, "answer_confidence": "yes", "answer_id": k + 1} for k, answer in enumerate(answers)]
    types = {"answer_type": "other" if i % 2 else "yes/no", "question_type": f"type {i % 3}"}
    return {"question_id": 10 * i, "image_id": i, "multiple_choice_answer": answers[0], "answers": given} | types


def vqa_files(questions: list, annotations: list | None, split: str = "train2014") -> dict[str, bytes]:
    files = {f"v2_OpenEnded_mscoco_{split}_questions.json": json.dumps({"questions": questions}).encode()}
    if annotations is not None:
        files[f"v2_mscoco_{split}_annotations.json"] = json.dumps({"annotations": annotations}).encode()
    return files


def pictures(*numbers: int, split: str = "train2014") -> dict[str, bytes]:
    return {f"{split}/COCO_{split}_{i:012d}.jpg": make_image(i) for i in numbers}


def test_vqa_makes_its_list_and_soft_scores(tmp_path):
    asked = [question(1), question(2, "is the LEFT one red?"), question(3), question(4)]
    answers = [
        annotation(1, *["A dog"] * 3, *["dog"] * 7),
        annotation(2, "yes", "yes", *["no"] * 8),
        annotation(3, "no", *["right"] * 9),
        annotation(4, *["yes"] * 9, "\n"),
    ]
    put(str(tmp_path), vqa_files(asked, answers) | pictures(1, 2, 3, 4))
    source = Vqa(str(tmp_path), at_least=1)
    # normalised, in the order of first occurrence
    assert source.schema.field("answers").values == ("dog", "yes", "no")
    assert source.schema.field("answer_type").values == ("other", "yes/no")
    first, second, third, fourth = read(source)
    # the targets count raw answers: "A dog" is not in the list
    assert first.values["answers"] == [{"answer": "dog", "score": 1.0}]
    assert second.values["answers"] == [{"answer": "yes", "score": 0.6}, {"answer": "no", "score": 1.0}]
    assert third.values["answers"] == [{"answer": "no", "score": 0.3}]
    assert fourth.values["given_answers"] == ["yes"] * 9 + ["?"]
    assert (first.id, first.image_id) == ("10", "train2014/COCO_train2014_000000000001.jpg")
    assert [record.forbid for record in (first, second, third, fourth)] == [(), ("flip",), ("flip",), ()]
    assert [record.values["question_type"] for record in (first, third)] == [1, 0]
    with pytest.raises(UserError, match="no answer occurs 9 times in the 4 annotations"):
        Vqa(str(tmp_path))


def test_vqa_joins_splits_and_takes_a_list(tmp_path):
    put(str(tmp_path), vqa_files([question(1)], [annotation(1, *["cat"] * 10)]) | pictures(1))
    put(str(tmp_path), vqa_files([question(2)], [annotation(2, *["dog"] * 10)], "val2014"))
    put(str(tmp_path), pictures(2, split="val2014"))
    put(str(tmp_path), {"lists/a.json": b'["", "dog", "cat"]', "lists/b.txt": b"dog\ncat\n"})
    for name, values in (("a.json", ("", "dog", "cat")), ("b.txt", ("dog", "cat"))):
        source = Vqa(str(tmp_path), split="train2014+val2014", answers=f"{tmp_path}/lists/{name}")
        assert source.schema.field("answers").values == values
        assert [record.id for record in read(source)] == ["10", "20"]
    rows = ({"id": r.id, "image_id": r.image_id, "forbid": list(r.forbid), **r.values} for r in read(source))
    write_dataset(f"{tmp_path}/made", rows, schema=source.schema)
    assert Vqa(str(tmp_path), answers=f"{tmp_path}/made").schema.field("answers") == source.schema.field("answers")
    put(str(tmp_path), vqa_files([question(3)], None, "test-dev2015") | pictures(3, split="test2015"))
    [record] = read(Vqa(str(tmp_path), split="test-dev2015"))
    assert set(record.values) == {"image", "text"} and not record.problem


def test_what_vqa_leaves_out_is_counted(tmp_path):
    asked = [question(i) for i in (1, 2, 3)]
    put(str(tmp_path), vqa_files(asked, [annotation(i, *["cat"] * 10) for i in (1, 2)]) | pictures(1, 3))
    problems = [record.problem for record in read(Vqa(str(tmp_path), at_least=1))]
    assert problems == ["", "the image file is missing", "the question has no annotation"]


@pytest.mark.parametrize(
    "files, options, words",
    [
        (vqa_files([], []), {}, "questions.json has no entry"),
        (vqa_files([question(1)], [annotation(2, *["a"] * 10)]), {}, "answer 1 questions that its questions lack"),
        (vqa_files([question(1)], None), {"answers": "list"}, "has no use"),
        (vqa_files([question(1)], None), {"split": "val2014"}, "has no file .*val2014_questions"),
        (vqa_files([{"question": "?"}], None), {}, "at entry 1: .*no 'question_id'"),
        (vqa_files([question(1) | {"image_id": "1"}], None), {}, "at entry 1: image_id is '1'"),
        (vqa_files([question(1) | {"question": None}], None), {}, "at entry 1: question is None"),
        (vqa_files([question(1)], [annotation(1, "a") | {"answers": None}]), {}, "at entry 1: answers is None"),
        (vqa_files([question(1)], [annotation(1, "a") | {"answers": ["a"]}]), {}, "has an answer that is no"),
        (vqa_files([question(1)], [annotation(1, "a", "b"), annotation(1, "c")]), {}, "have question 10 twice"),
        ({"a_OpenEnded_train2014_questions.json": b"{"}, {}, "not an annotation file"),
        ({f"{x}_OpenEnded_train2014_questions.json": b"{}" for x in "ab"}, {}, "several files for the split"),
        (vqa_files([question(1)], [annotation(1, *["a"] * 10)]), {"answers": "list.json"}, "is not a list of answers"),
        (vqa_files([question(1)], [annotation(1, *["a"] * 10)]), {"answers": "pairs"}, "pairs has no answers; give"),
    ],
)
def test_mistakes_in_vqa_files_are_named(tmp_path, files, options, words):
    put(str(tmp_path), files | pictures(1) | {"list.json": b"{}"})
    write_dataset(f"{tmp_path}/pairs", make_records(1))
    options = options | ({"answers": f"{tmp_path}/{options['answers']}"} if "answers" in options else {})
    with pytest.raises(UserError, match=words):
        Vqa(str(tmp_path), **options)


def line(identifier: str, text: str = "both are red", label: str = "True", **more) -> dict:
    return {"identifier": identifier, "sentence": text, "label": label} | more


def lines(*entries: dict) -> bytes:
    return b"\n".join(json.dumps(entry).encode() for entry in entries) + b"\n\n"


def test_nlvr2_reads_either_layout(tmp_path):
    entries = (
        line("train-1-0-0", "the left image shows a dog", directory=7),
        line("train-1-1-0", "a dog on the left", "false"),
        line("dev-2-0-1", "one is red", "maybe"),
        line("dev-3-0-1"),
        line("train-1-0-1", "two dogs, and the left one is brown", directory=7),
    )
    put(str(tmp_path), {"train.json": lines(*entries)})
    stems = ("images/train/7/train-1-0", "images/train/train-1-1", "images/dev-2-0")
    put(str(tmp_path), {f"{stem}-img{k}.png": make_image(i + 10 * k) for i, stem in enumerate(stems) for k in (0, 1)})
    source = Nlvr2(f"{tmp_path}/train.json")
    first, second, third, fourth, fifth = read(source)
    assert fifth.forbid == ("flip",)
    put(str(tmp_path), {"none.json": lines(line("train-1-0-2", None, directory=7))})
    none = Nlvr2(f"{tmp_path}/none.json", images=f"{tmp_path}/images")
    [record] = [record for unit in none.units() for record in none.records(unit)]
    assert problem_of(record, none.schema) == "there is no text"
    assert first.values["image"] == make_image(0) and first.values["image_2"] == make_image(10)
    assert [record.values["label"] for record in (first, second)] == [1, 0]
    # the key of consistency is the identifier without the pair
    assert first.values["sentence"] == second.values["sentence"] == "train-1--0" and first.image_id == "train-1-0"
    assert (first.forbid, second.forbid) == ((), ("flip",))
    assert (third.problem, fourth.problem) == ("the label is not True or False", "the image file is missing")
    put(str(tmp_path), {"bad.json": lines(line("train-1-0"))})
    with pytest.raises(UserError, match="'train-1-0', not split-set-pair-sentence"):
        Nlvr2(f"{tmp_path}/bad.json")


def test_snli_ve_reads_both_forms(tmp_path):
    official = [
        {"Flickr30K_ID": "1", "pairID": "p1", "sentence1": "x", "sentence2": "a dog", "gold_label": "entailment"},
        {"Flickr30K_ID": "2", "pairID": "p2", "sentence1": "x", "sentence2": "a cat", "gold_label": "-"},
    ]
    albef = [{"image": "1", "sentence": "on the left", "label": "contradiction"}]
    put(str(tmp_path), {"a.jsonl": lines(*official), "b.json": json.dumps(albef).encode()})
    put(str(tmp_path), {f"flickr30k-images/{i}.jpg": make_image(i) for i in (1, 2)})
    first, second = read(SnliVe(f"{tmp_path}/a.jsonl"))
    assert (first.id, first.image_id, first.values["text"], first.values["label"]) == ("p1", "1.jpg", "a dog", 2)
    assert second.problem == "the label is none of contradiction, neutral, entailment"
    [third] = read(SnliVe(f"{tmp_path}/b.json"))
    assert (third.id, third.values["label"], third.forbid) == ("0", 0, ("flip",))
    put(str(tmp_path), {"c.jsonl": lines({"sentence2": "a"})})
    with pytest.raises(UserError, match=r"c\.jsonl is not an annotation file of this format, at entry 1"):
        SnliVe(f"{tmp_path}/c.jsonl")


def test_words_for_sides():
    for text in (
        "LEFT dog",
        "the leftmost",
        "right-hand side",
        "righthand man",
        "lft guy",
        "rt.",
        "rightie",
        "on the rghtmost",
    ):
        assert names_sides(text), text
    for text in ("a bright upright piano", "leftover pizza", "art", "righteous", "cart"):
        assert not names_sides(text), text
