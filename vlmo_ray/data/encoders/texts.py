"""A text alone, with masked words: for the language stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmo_ray import rng
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import text_columns, tokenizer
from vlmo_ray.data.schema import Record
from vlmo_ray.data.text import IGNORED_LABEL, mask_whole_words


@dataclass(frozen=True)
class MaskedTexts(Encoder):
    """mlm_ids, mlm_labels int32 `[T]`: the ids with words masked, and the true ids there; text_mask bool `[T]`.

    In an evaluation the masked words are a function of the record's id.
    """

    max_text_len: int
    vocab_size: int
    mlm_probability: float

    fields = ("text",)

    @property
    def columns(self) -> Mapping[str, Column]:
        text = text_columns(self.max_text_len)
        labels = Column("int32", (self.max_text_len,), IGNORED_LABEL)
        return {"mlm_ids": text["text_ids"], "text_mask": text["text_mask"], "mlm_labels": labels}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        ids, mask, word = tokenizer(self.max_text_len).encode(record.values["text"])
        words = (draw or Draw(0, 0, rng.hash_text(record.id))).generator("mlm")
        masked, labels = mask_whole_words(ids, word, self.vocab_size, self.mlm_probability, words)
        return {"mlm_ids": masked, "text_mask": mask, "mlm_labels": labels}
