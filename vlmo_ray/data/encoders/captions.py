"""An image and one of its captions with most tokens masked, for learning to write; an image and all its captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.schema import Record
from vlmo_ray.data.text import mask_tokens
from vlmo_ray.errors import RecordError

_REFERENCE_BYTES = 8192  # of all captions of an image


@dataclass(frozen=True)
class MaskedCaptions(MaskedPairs):
    """image uint8 `[3, H, W]`; text_mask bool, mlm_ids, mlm_labels int32 `[T]`.

    Any token but [CLS] may be masked, also [SEP], and not whole words: what is learned is the next token.
    """

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            name: super(MaskedCaptions, self).columns[name] for name in ("image", "text_mask", "mlm_ids", "mlm_labels")
        }

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        row, _ = self._pair(record, draw)
        words = (draw or Draw(0, 0, rng.hash_text(record.id))).generator("caption_mask")
        ids, labels = mask_tokens(row["text_ids"], row["text_mask"], self.vocab_size, self.mlm_probability, words)
        return {"image": row["image"], "text_mask": row["text_mask"], "mlm_ids": ids, "mlm_labels": labels}


@dataclass(frozen=True)
class CaptionedImages(Encoder):
    """image uint8 `[3, H, W]`; with `references` also references uint8 `[bytes]`, see `references_of`."""

    image_size: int
    references: bool
    data: DataConfig

    @property
    def fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of an instance here
        return ("image", "captions") if self.references else ("image",)

    @property
    def columns(self) -> Mapping[str, Column]:
        references = {"references": Column("uint8", (_REFERENCE_BYTES,))} if self.references else {}
        return {"image": image_column(self.image_size)} | references

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        row = {"image": image_row(record, "image", self.image_size, self.data, draw)}
        if self.references:
            text = "\n".join(" ".join(caption.split()) for caption in record.values["captions"]).encode()
            if len(text) > _REFERENCE_BYTES:
                raise RecordError(f"the captions have more than {_REFERENCE_BYTES} bytes together")
            row["references"] = np.frombuffer(text.ljust(_REFERENCE_BYTES, b"\0"), np.uint8)
        return row


def references_of(column: np.ndarray) -> list[str]:
    """The captions in one row of the column `references`."""
    return column.tobytes().rstrip(b"\0").decode().split("\n")
