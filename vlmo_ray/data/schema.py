"""What a record is, what makes one valid, and the limits: the same rule for preparing a data set and for reading it.

A record has an id, an image_id, a list of forbidden augmentations, and the fields that its data set declares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from tokenizers.normalizers import BertNormalizer

from vlmo_ray.errors import UserError

Kind = Literal["image", "text", "label", "mask", "answers", "captions", "boxes"]

FORBID = ("crop", "flip", "color", "geometric")  # the augmentations that a record may rule out
MAX_PIXELS = 64_000_000  # 192 MB decoded to RGB; a few bytes of header can claim far more
MAX_SIDE = 30_000
IGNORED = 255  # in a mask: a pixel of no class
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # some of Pillow's other formats run programs

# the tokenizer's; it leaves out control and format characters and accents, so a text of these alone has no tokens
TEXT_NORMALIZER = BertNormalizer(lowercase=True)

_RESERVED = ("id", "image_id", "forbid")
_TYPES = {
    "image": pa.binary(),
    "text": pa.string(),
    "label": pa.int32(),
    "mask": pa.binary(),
    "answers": pa.list_(pa.struct({"answer": pa.string(), "score": pa.float32()})),
    "captions": pa.list_(pa.string()),
    "boxes": pa.list_(pa.list_(pa.float32())),
}


@dataclass(frozen=True)
class Field:
    """One declared column. Its values in a record, by kind:

    image     encoded bytes
    text      a string with a visible character
    label     an integer from 0, less than the number of `values` where they are given
    mask      encoded bytes of an image with one channel; with `values`, its numbers are those of classes, from 0, and
              IGNORED where there is none
    answers   a list of {"answer": string, "score": 0 to 1}, maybe empty; answers are among `values` where given
    captions  a list of at least one text
    boxes     a list of [x0, y0, x1, y1] in pixels of the stored image, x0 < x1 and y0 < y1, maybe empty
    """

    name: str  # of the column; "image_2" is a second image
    kind: Kind
    values: tuple[str, ...] = ()  # names of the classes of a label or a mask, or the possible answers; () if open

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"{self.kind!r} is not a kind of column; choose from {', '.join(get_args(Kind))}")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", self.name) or self.name in _RESERVED:
            raise UserError(
                f"{self.name!r} cannot name a column; use letters, digits and '_', and none of {', '.join(_RESERVED)}"
            )
        if self.values and self.kind not in ("label", "mask", "answers"):
            raise UserError(f"the column {self.name!r} is of kind {self.kind!r}, which has no list of values")
        if self.kind == "mask" and len(self.values) > IGNORED:
            raise UserError(f"the mask {self.name!r} has {len(self.values)} classes; use at most {IGNORED}")
        if len(set(self.values)) < len(self.values):
            twice = next(value for i, value in enumerate(self.values) if value in self.values[:i])
            raise UserError(f"the column {self.name!r} has the value {twice!r} twice; name it once")

    @cached_property
    def known(self) -> frozenset[str]:
        """`values`, for a quick `in`."""
        return frozenset(self.values)


@dataclass(frozen=True)
class Schema:
    """The columns that a data set declares besides `id`, `image_id` and `forbid`, which every data set has."""

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        if not self.fields:
            raise UserError("a data set needs at least one column besides its ids")
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise UserError(f"the column {twice[0]!r} is declared twice; declare it once")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def field(self, name: str) -> Field:
        """The field of this name; UserError if it is not declared."""
        for field in self.fields:
            if field.name == name:
                return field
        raise UserError(f"the data set has no column {name!r}; it has {', '.join(self.names)}")

    @property
    def arrow(self) -> pa.Schema:
        """The stored columns: id, image_id, the fields in their order, forbid."""
        columns = {field.name: _TYPES[field.kind] for field in self.fields}
        ids = {"id": pa.string(), "image_id": pa.string()}
        return pa.schema(ids | columns | {"forbid": pa.list_(pa.string())})

    def to_json(self) -> list[dict]:
        """Lists and dicts for `json.dumps`."""
        return [
            {"name": field.name, "kind": field.kind} | ({"values": list(field.values)} if field.values else {})
            for field in self.fields
        ]

    @classmethod
    def from_json(cls, fields: list[dict]) -> Schema:
        """The inverse of `to_json`; KeyError, TypeError or UserError for anything else."""
        return cls(tuple(Field(f["name"], f["kind"], tuple(f.get("values", ()))) for f in fields))

    @classmethod
    def parse(cls, columns: str) -> Schema:
        """From "image,label" or "left:image,image_2,question:text".

        A column is `name:kind`. The kind may be left out where the name is a kind, or a kind and a number.
        """
        fields = []
        for column in columns.split(","):
            name, colon, kind = column.strip().partition(":")
            kind = kind if colon else re.sub(r"_\d+$", "", name)
            fields.append(Field(name, cast("Kind", kind)))  # `Field` checks it
        return cls(tuple(fields))


PAIRS = Schema((Field("image", "image"), Field("text", "text")))  # also of manifests that state no schema


@dataclass
class Record:
    """One stored row. A record with a `problem` keeps its place but must be masked out."""

    id: str
    image_id: str
    values: dict[str, Any]  # of the declared fields, or of those that were asked for
    forbid: tuple[str, ...] = ()  # augmentations that would make the record untrue
    problem: str = ""  # why it cannot be used, "" if it can
    address: str = ""  # <uri>/<shard>#<chunk>:<row>


def problem_of(record: Record, schema: Schema, names: Collection[str] | None = None) -> str:
    """Why the record cannot be used, "" if it can; checks the fields `names`, by default all.

    This is the only rule of what is valid, except that `decode.image_problem` checks whether bytes are an image.
    Messages name columns and no values, so that they can be counted.
    """
    if record.problem:
        return record.problem
    for field in schema.fields:
        if names is None or field.name in names:
            value = record.values.get(field.name)
            if problem := _problem_of_value(value, field):
                return problem
    has_image = any(field.kind == "image" for field in schema.fields)
    if not record.id or (has_image and not record.image_id):
        return "there is no id or no image_id"
    if not (is_unicode(record.id) and is_unicode(record.image_id)):
        return "an id is not valid Unicode text"
    if any(name not in FORBID for name in record.forbid):
        return f"forbid has a value other than {', '.join(FORBID)}"
    return ""


def check_declared(columns: Iterable[str], schema: Schema) -> None:
    """UserError if one of the columns is not declared, because it would be lost."""
    for name in columns:
        if name not in schema:
            raise UserError(
                f"the column {name!r} is not declared, and would be lost: the schema has "
                f"{', '.join(schema.names)}; declare it there, or leave it out of the records"
            )


def encodable(text: str) -> str:
    """The text without lone surrogates, which names in a tar and JSON can have and Arrow cannot store."""
    return text.encode("utf-8", "replace").decode()


def is_unicode(text: str) -> bool:
    return isinstance(text, str) and (text.isascii() or encodable(text) == text)


def _problem_of_value(value: Any, field: Field) -> str:
    name, several = field.name, field.kind in ("answers", "captions", "boxes")
    if value is None:
        return f"there {'are' if several else 'is'} no {name}"
    lists = (list, tuple, np.ndarray) if field.kind == "boxes" else (list, tuple)
    if several and not isinstance(value, lists):
        return f"the {name} are not a list"
    match field.kind:
        case "image" | "mask":
            if not isinstance(value, bytes):
                return f"the {name} is not bytes"
            return "" if value else f"there is no {name}"
        case "text":
            return problem_of_text(value, name)
        case "label":
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                return f"the {name} is not an integer"
            in_range = 0 <= value < (len(field.values) or 2**31)
            return "" if in_range else f"the {name} is not the number of a class"
        case "answers":
            return next(filter(None, (_problem_of_answer(answer, field) for answer in value)), "")
        case "captions":
            problems = (problem_of_text(text, f"text in {name}") for text in value)
            return next(filter(None, problems), "") if value else f"there are no {name}"
        case "boxes":
            return "" if all(map(_is_box, value)) else f"{name} has a value that is not a box"


def problem_of_text(text: Any, name: str) -> str:
    """Why a value is not a text, "" if it is one."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return f"there is no {name}"
    if not isinstance(text, str):
        return f"the {name} is not a string"
    if not is_unicode(text):
        return f"the {name} is not valid Unicode"
    return "" if TEXT_NORMALIZER.normalize_str(text).strip() else f"there is no {name}"


def _problem_of_answer(answer: Any, field: Field) -> str:
    name = f"answer in {field.name}"
    if not isinstance(answer, Mapping) or set(answer) != {"answer", "score"}:
        return f"an {name} is not an answer and a score"
    if problem := problem_of_text(answer["answer"], name):
        return problem
    if field.values and answer["answer"] not in field.known:
        return f"an {name} is not one of the values"
    score = answer["score"]
    is_number = isinstance(score, int | float | np.integer | np.floating) and not isinstance(score, bool)
    in_range = is_number and 0 <= score <= 1
    return "" if in_range else f"a score in {field.name} is not between 0 and 1"


def _is_box(box: Any) -> bool:
    """Checks the box in float32, as it is stored: near numbers become equal, and huge ones infinite."""
    try:
        with np.errstate(over="ignore"):
            x0, y0, x1, y1 = map(float, np.asarray(box, dtype=np.float32))
    except (TypeError, ValueError):
        return False
    return x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1)))
