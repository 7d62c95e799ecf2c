"""A statement about one or two images, and the number of its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import text_columns, tokenizer
from vlmo_ray.data.schema import Record


@dataclass(frozen=True)
class Statements(Encoder):
    """Each of `images` uint8 `[3, H, W]`; text_ids int32, text_mask bool `[T]`; label int64, an index into `names`.

    If the data set is read with its column `sentence`, sentence_key int64 is equal for equal sentences.
    """

    image_size: int
    max_text_len: int
    names: tuple[str, ...]
    data: DataConfig
    images: tuple[str, ...] = ("image",)
    with_sentence: bool = False

    @property
    def fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of an instance here
        return (*self.images, "text", "label", *(("sentence",) if self.with_sentence else ()))

    @property
    def columns(self) -> Mapping[str, Column]:
        images = dict.fromkeys(self.images, image_column(self.image_size))
        keys = {"sentence_key": Column("int64")} if self.with_sentence else {}
        return images | text_columns(self.max_text_len) | {"label": Column("int64")} | keys

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        return {"label": self.names}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        ids, mask, _ = tokenizer(self.max_text_len).encode(record.values["text"])
        row: Row = {"text_ids": ids, "text_mask": mask, "label": record.values["label"]}
        for name in self.images:
            # each image is augmented by draws of its own
            own = draw if draw is None or name == "image" else replace(draw, seed=rng.stream(draw.seed, name))
            row[name] = image_row(record, name, self.image_size, self.data, own)
        if self.with_sentence:
            row["sentence_key"] = rng.hash_text(record.values["sentence"])
        return row
