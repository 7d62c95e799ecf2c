"""VQA v2: the official question and annotation files, with COCO's image folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmo_ray.data.answers import answer_list, soft_score
from vlmo_ray.data.manifest import MANIFEST, load_manifest
from vlmo_ray.data.prepare.entries import Kinds, json_entries, names_sides
from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

_OF_QUESTION: Kinds = {"question_id": (int, str), "image_id": int, "question": str}
_OF_ANNOTATION: Kinds = {
    "question_id": (int, str), "answers": list, "multiple_choice_answer": str, "answer_type": str, "question_type": str,
}  # fmt: skip


@dataclass
class Vqa(Source):
    """One question a record; `image_id` is the path of the image, the id that of the question.

    `uri` is a folder with `*OpenEnded*<split>_questions.json` and `*<split>_annotations.json`; `split` may join
    several: "train2014+val2014". A split without annotations has no answers. Images are
    `<split>/COCO_<split>_<number>.jpg` in the folder `images`, by default `uri`; those of test-dev2015 are test2015's.

    The list of answers is that of `answers`, a file (JSON, or an answer a line) or a prepared data set, or else made of
    the answers that occur `at_least` times in the annotations.
    """

    format: ClassVar[str] = "vqa"

    uri: str
    split: str = "train2014"
    images: str | None = None
    answers: str | None = None
    at_least: int = 9

    def __post_init__(self) -> None:
        store = open_store(self.uri)
        self.uri = store.uri
        self._images = open_store(self.images) if self.images else store
        names = [name for name in store.list() if "/" not in name]
        digest = hashlib.sha256()
        asked: list[tuple[str, dict, dict | None]] = []  # split, question, annotation
        annotated = []
        for split in self.split.split("+"):
            named = _one(store, names, f"OpenEnded.*{re.escape(split)}_questions\\.json$", split)
            questions = _entries(store, named, "questions", _OF_QUESTION, digest)
            named = _one(store, names, f"{re.escape(split)}_annotations\\.json$", split)
            annotations = _entries(store, named, "annotations", _OF_ANNOTATION, digest)
            if questions is None:
                raise UserError(
                    f"{self.uri} has no file *OpenEnded*{split}_questions.json; name its splits by split=..."
                )
            annotated.append(annotations is not None)
            by_id: dict[int | str, dict] = {}
            for entry in annotations or ():
                number = entry["question_id"]
                if by_id.setdefault(number, entry) is not entry:
                    raise UserError(f"the annotations of {split} in {self.uri} have question {number} twice")
                if not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in entry["answers"]):
                    raise UserError(f"the annotation of question {number} in {self.uri} has an answer that is no text")
            if strange := by_id.keys() - {entry["question_id"] for entry in questions}:
                raise UserError(
                    f"the annotations of {split} in {self.uri} answer {len(strange):,} questions that its questions "
                    f"lack, e.g. {min(strange)}; take both files from one release"
                )
            asked += [(split, entry, by_id.get(entry["question_id"])) for entry in questions]
        if len(set(annotated)) > 1:
            raise UserError(f"only some of the splits {self.split} have annotations; prepare the others alone")
        self._annotated = annotated[0]
        found = [annotation for _, _, annotation in asked if annotation is not None]
        self.schema = self._schema_of(found)
        self.listing = digest.hexdigest() + str(self.schema.to_json())
        entries = [self._entry(*entry) for entry in asked]
        mean = mean_image_bytes(self._images, [entry["path"] for entry in entries])
        self._units = cut_units("questions", ((entry, mean) for entry in entries))

    def _schema_of(self, annotations: list[dict]) -> Schema:
        pair = Field("image", "image"), Field("text", "text")
        if not self._annotated:
            if self.answers:
                raise UserError(f"answers={self.answers} has no use: the split {self.split} has no annotations")
            return Schema(pair)
        if self.answers:
            values = _answers_of(self.answers)
        else:
            values = answer_list([entry["multiple_choice_answer"] for entry in annotations], self.at_least)
            if not values:
                raise UserError(
                    f"no answer occurs {self.at_least} times in the {len(annotations)} annotations of {self.split}; "
                    "lower at_least, or give the list of answers by answers=FILE"
                )
        types = [
            Field(name, "label", tuple(sorted({entry[name] for entry in annotations})))
            for name in ("answer_type", "question_type")
        ]
        return Schema((*pair, Field("answers", "answers", values), Field("given_answers", "captions"), *types))

    def _entry(self, split: str, question: dict, annotation: dict | None) -> dict[str, Any]:
        images = "test2015" if split == "test-dev2015" else split
        entry: dict[str, Any] = {
            "id": str(question["question_id"]),
            "path": f"{images}/COCO_{images}_{question['image_id']:012d}.jpg",
            "values": {"text": question["question"]},
            "forbid": (),
            "problem": "",
        }
        if self._annotated and annotation is None:
            entry["problem"] = "the question has no annotation"
        elif annotation is not None:
            given = [answer["answer"] for answer in annotation["answers"]]
            known = self.schema.field("answers").known
            scored = [
                {"answer": answer, "score": soft_score(count)}
                for answer, count in Counter(given).items()
                if answer in known and answer.strip()
            ]
            numbers = {
                name: self.schema.field(name).values.index(annotation[name])
                for name in ("answer_type", "question_type")
            }
            # a blank answer compares like a lone question mark, and could not be stored
            entry["values"] |= {"answers": scored, "given_answers": [a if a.strip() else "?" for a in given]} | numbers
        words = " ".join([question["question"], *entry["values"].get("given_answers", ())])
        if names_sides(words):
            entry["forbid"] = ("flip",)
        return entry

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (entry["path"] for entry in unit.content))
        for entry, (image, problem) in zip(unit.content, images, strict=True):
            yield Record(
                entry["id"],
                entry["path"],
                entry["values"] | {"image": image},
                forbid=entry["forbid"],
                problem=entry["problem"] or problem,
                address=f"{self.uri}#{entry['id']}",
            )


def _one(store: Store, names: list[str], pattern: str, split: str) -> str | None:
    found = [name for name in names if re.search(pattern, name)]
    if len(found) > 1:
        raise UserError(f"{store.uri} has several files for the split {split}: {', '.join(found)}; keep one there")
    return found[0] if found else None


def _entries(store: Store, name: str | None, what: str, required: Kinds, digest) -> list[dict] | None:
    """The list `what` of an official file, None if there is no such file."""
    if name is None:
        return None
    data = store.read(name)
    digest.update(data)
    return json_entries(data, store.address(name), required, what)


def _answers_of(uri: str) -> tuple[str, ...]:
    """Of a file, or of a prepared data set."""
    if Store(uri).exists(MANIFEST):
        schema = load_manifest(uri).schema
        if "answers" not in schema:
            raise UserError(f"{uri} has no answers; give the data set of vlmo prepare vqa that has them, or a file")
        return schema.field("answers").values
    store, name = open_file(uri)
    try:
        text = store.read(name).decode("utf-8-sig")
        lines: Iterable[Any] = json.loads(text) if name.endswith(".json") else text.splitlines()
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError("it holds other things than strings")
    except ValueError as error:
        raise UserError(
            f"{store.address(name)} is not a list of answers: {error}; write a JSON list, or one a line"
        ) from error
    return tuple(lines)
