"""An image and its caption: for retrieval, and with masked words for pre-training (paper section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.schema import Record
from vlmo_ray.data.text import CLS_ID, IGNORED_LABEL, SEP_ID, Tokenizer, mask_whole_words, normalise


@functools.lru_cache(maxsize=2)
def tokenizer(max_len: int) -> Tokenizer:
    """Built once in a data process."""
    return Tokenizer(max_len)


def text_columns(max_len: int) -> dict[str, Column]:
    """Token ids and mask of one text; an invalid row has an empty text."""
    ids, mask = np.zeros(max_len, np.int32), np.zeros(max_len, bool)
    ids[:2], mask[:2] = (CLS_ID, SEP_ID), True
    return {"text_ids": Column("int32", (max_len,), ids), "text_mask": Column("bool", (max_len,), mask)}


@dataclass(frozen=True)
class Pairs(Encoder):
    """image uint8 `[3, H, W]`; text_ids int32, text_mask bool `[T]`; image_key, text_key int64.

    Pairs of the same image have equal `image_key`s, and pairs of the same text equal `text_key`s. With `captions`, the
    text is one of the record's captions, drawn anew in each step; in an evaluation the first.
    """

    image_size: int
    max_text_len: int
    data: DataConfig
    captions: bool = field(default=False, kw_only=True)

    @property
    def fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of an instance here
        return ("image", "captions" if self.captions else "text")

    @property
    def columns(self) -> Mapping[str, Column]:
        keys = {"image_key": Column("int64"), "text_key": Column("int64")}
        return {"image": image_column(self.image_size)} | text_columns(self.max_text_len) | keys

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        return self._pair(record, draw)[0]

    def _pair(self, record: Record, draw: Draw | None) -> tuple[Row, np.ndarray]:
        """The row, and the index of the word that each token belongs to, int16 `[T]`."""
        text = self._text(record, draw)
        image = image_row(record, "image", self.image_size, self.data, draw)
        ids, mask, word = tokenizer(self.max_text_len).encode(text)
        keys = {"image_key": rng.hash_text(record.image_id), "text_key": rng.hash_text(normalise(text))}
        return {"image": image, "text_ids": ids, "text_mask": mask} | keys, word

    def _text(self, record: Record, draw: Draw | None) -> str:
        if not self.captions:
            return record.values["text"]
        captions = record.values["captions"]
        return captions[int(draw.generator("caption").random() * len(captions)) if draw else 0]


@dataclass(frozen=True)
class MaskedPairs(Pairs):
    """`Pairs` with mlm_ids, mlm_labels int32 `[T]`: text_ids with words masked, and the true ids there.

    In an evaluation the masked words are a function of the record's id.
    """

    vocab_size: int
    mlm_probability: float

    @property
    def columns(self) -> Mapping[str, Column]:
        text = text_columns(self.max_text_len)["text_ids"]
        labels = Column("int32", (self.max_text_len,), IGNORED_LABEL)
        return {**super().columns, "mlm_ids": text, "mlm_labels": labels}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        row, word = self._pair(record, draw)
        words = (draw or Draw(0, 0, rng.hash_text(record.id))).generator("mlm")
        masked = mask_whole_words(row["text_ids"], word, self.vocab_size, self.mlm_probability, words)
        return row | dict(zip(("mlm_ids", "mlm_labels"), masked, strict=True))
