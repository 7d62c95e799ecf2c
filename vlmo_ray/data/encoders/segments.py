"""An image and the class of each of its pixels: a square part of it for training, all of it for an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_mask, decode_train_with_mask, decode_whole, image_column, size_of
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.schema import IGNORED, Record
from vlmo_ray.errors import RecordError

_ASPECT = 4  # the longest side of an image that is evaluated / its shortest
_MASK_PIXELS = 1 << 21  # of a mask that is evaluated; images of ADE20K have a million, of Cityscapes two


@dataclass(frozen=True)
class Segments(Encoder):
    """image uint8 `[3, S, S]`; mask uint8 `[S, S]`: the class of each pixel, or IGNORED. The two have the same draw."""

    image_size: int
    names: tuple[str, ...]
    data: DataConfig

    fields = ("image", "mask")

    @property
    def columns(self) -> Mapping[str, Column]:
        mask = Column("uint8", (self.image_size, self.image_size), IGNORED)
        return {"image": image_column(self.image_size), "mask": mask}

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        return {"mask": self.names}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        assert draw is not None, "an evaluation reads whole images"
        image, mask = record.values["image"], record.values["mask"]
        pixels, classes = decode_train_with_mask(image, mask, self.image_size, self.data, record.forbid, draw)
        return {"image": pixels, "mask": self._known(classes)}

    def _known(self, mask: np.ndarray) -> np.ndarray:
        if ((mask >= len(self.names)) & (mask != IGNORED)).any():
            raise RecordError(f"the mask has a value that is none of {len(self.names)} classes, nor {IGNORED}")
        return mask


@dataclass(frozen=True)
class WholeSegments(Segments):
    """Images of any size, in columns of fixed length whose first values count.

    image uint8 `[3 x 4 x S x S]` of the image whose shorter side is resized to S; mask uint8, as it is stored;
    image_shape, mask_shape int64 `[2]`: height, width. Longer images and larger masks are records that cannot be used.
    """

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "image": Column("uint8", (3 * _ASPECT * self.image_size**2,)),
            "image_shape": Column("int64", (2,), self.image_size),
            "mask": Column("uint8", (_MASK_PIXELS,), IGNORED),
            "mask_shape": Column("int64", (2,), 1),
        }

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        pixels = decode_whole(record.values["image"], self.image_size, self.data)
        mask = self._known(decode_mask(record.values["mask"]))
        _check_aspect(*size_of(record.values["image"]), *mask.shape[::-1])
        if max(pixels.shape[1:]) > _ASPECT * self.image_size:
            raise RecordError(f"the image is more than {_ASPECT} times as long as it is wide, or as wide as it is long")
        if mask.size > _MASK_PIXELS:
            raise RecordError(f"the mask has more than {_MASK_PIXELS} pixels, the most that can be evaluated")
        row: Row = {"image_shape": pixels.shape[1:], "mask_shape": mask.shape}
        for name, values in (("image", pixels), ("mask", mask)):
            column = self.columns[name]
            row[name] = np.full(column.shape, column.fill, column.dtype)
            row[name][: values.size] = values.reshape(-1)
        return row


def _check_aspect(width: int, height: int, mask_width: int, mask_height: int) -> None:
    """Raises RecordError if the mask, which may be larger than its image or smaller, has another aspect ratio."""
    rounding = max(width, height, mask_width, mask_height)  # of a side by a pixel
    if abs(width * mask_height - height * mask_width) > rounding:
        raise RecordError("the mask has another aspect ratio than the image")
