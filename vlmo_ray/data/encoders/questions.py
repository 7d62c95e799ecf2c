"""An image, a question about it, and what each answer of the list is worth."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from vlmo_ray.config import DataConfig
from vlmo_ray.data.answers import AnswerList
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import text_columns, tokenizer
from vlmo_ray.data.schema import Record

# What a data set may have beside image and text: scored answers of the list; all answers as people gave them; and the
# type of the answer and of the question.
OPTIONAL = ("answers", "given_answers", "answer_type", "question_type")


@functools.lru_cache(maxsize=2)
def answer_list(answers: tuple[str, ...]) -> AnswerList:
    """Built once in a data process."""
    return AnswerList(answers)


@dataclass(frozen=True)
class Questions(Encoder):
    """image uint8 `[3, H, W]`; text_ids int32, text_mask bool `[T]`; of those in `reads` also:

    answers        -> target float32 `[K]`, the soft score of each answer of the list
    given_answers  -> accuracy float32 `[K]`, the official accuracy of each answer (in an evaluation only)
    answer_type, question_type -> int64, an index into the column's values (in an evaluation only)
    """

    image_size: int
    max_text_len: int
    names: tuple[str, ...]  # the list of answers
    data: DataConfig
    reads: tuple[str, ...] = ("answers",)  # of OPTIONAL

    @property
    def fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of an instance here
        return ("image", "text", *self.reads)

    @property
    def columns(self) -> Mapping[str, Column]:
        optional = {
            "answers": ("target", Column("float32", (len(self.names),))),
            "given_answers": ("accuracy", Column("float32", (len(self.names),))),
            "answer_type": ("answer_type", Column("int64")),
            "question_type": ("question_type", Column("int64")),
        }
        image = {"image": image_column(self.image_size)}
        return image | text_columns(self.max_text_len) | dict(optional[name] for name in self.reads)

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        return {"answers": self.names} if "answers" in self.reads else {}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        ids, mask, _ = tokenizer(self.max_text_len).encode(record.values["text"])
        row = {
            "image": image_row(record, "image", self.image_size, self.data, draw),
            "text_ids": ids,
            "text_mask": mask,
        }
        known = answer_list(self.names)
        for name in self.reads:
            value = record.values[name]
            if name == "answers":
                row["target"] = known.targets(value)
            elif name == "given_answers":
                row["accuracy"] = known.accuracies(value)
            else:
                row[name] = value
        return row
