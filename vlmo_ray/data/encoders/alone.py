"""An image alone, or a text alone, as they are: for vectors of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import text_columns, tokenizer
from vlmo_ray.data.schema import Record


@dataclass(frozen=True)
class Images(Encoder):
    """image uint8 `[3, H, W]`."""

    image_size: int
    data: DataConfig

    fields = ("image",)

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"image": image_column(self.image_size)}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        return {"image": image_row(record, "image", self.image_size, self.data, draw)}


@dataclass(frozen=True)
class Texts(Encoder):
    """text_ids int32, text_mask bool `[T]`."""

    max_text_len: int

    fields = ("text",)

    @property
    def columns(self) -> Mapping[str, Column]:
        return text_columns(self.max_text_len)

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        ids, mask, _ = tokenizer(self.max_text_len).encode(record.values["text"])
        return {"text_ids": ids, "text_mask": mask}
