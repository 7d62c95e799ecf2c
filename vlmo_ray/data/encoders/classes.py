"""An image and the number of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_center, image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.schema import Record


@dataclass(frozen=True)
class Classes(Encoder):
    """image uint8 `[3, H, W]`; label int64, an index into `names`. In evaluation the image is the whole one, resized to
    a square, or with `center` the centre of it."""

    image_size: int
    names: tuple[str, ...]
    data: DataConfig
    center: bool = False

    fields = ("image", "label")

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"image": image_column(self.image_size), "label": Column("int64")}

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        return {"label": self.names}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        if draw is None and self.center:
            image = decode_center(record.values["image"], self.image_size, self.data)
        else:
            image = image_row(record, "image", self.image_size, self.data, draw)
        return {"image": image, "label": record.values["label"]}
