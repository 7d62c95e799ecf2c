"""An image, an expression that refers to one box in it, and maybe the boxes to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_eval, image_column, size_of
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.encoders.pairs import text_columns, tokenizer
from vlmo_ray.data.schema import Record
from vlmo_ray.errors import RecordError

MAX_PROPOSALS = 100  # as many as Mask R-CNN detects in an image

_BEYOND = 1.0  # pixels by which a box may leave its image: annotators' coordinates are not whole
_WHOLE = np.array([0, 0, 1, 1], np.float32)  # of an image of one pixel, which stands for one that cannot be used


@dataclass(frozen=True)
class Regions(Encoder):
    """image uint8 `[3, H, W]`, the whole of it; text_ids int32, text_mask bool `[T]`; size int64 `[2]`, the width and
    height of the stored image; box float32 `[4]`, the only one of `boxes`.

    With `reads_proposals` also proposals float32 `[MAX_PROPOSALS, 4]` and num_proposals int64, how many those are.
    Boxes are x0, y0, x1, y1 in pixels of the stored image. Only for evaluation: nothing is augmented.
    """

    image_size: int
    max_text_len: int
    data: DataConfig
    reads_proposals: bool = False

    @property
    def fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of an instance here
        return ("image", "text", "boxes", *(["proposals"] if self.reads_proposals else []))

    @property
    def columns(self) -> Mapping[str, Column]:
        shown = {"image": image_column(self.image_size)} | text_columns(self.max_text_len)
        truth = {"size": Column("int64", (2,), 1), "box": Column("float32", (4,), _WHOLE)}
        proposals = {"proposals": Column("float32", (MAX_PROPOSALS, 4)), "num_proposals": Column("int64")}
        return shown | truth | (proposals if self.reads_proposals else {})

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        assert draw is None, "an image that is augmented has its boxes elsewhere"
        image, boxes = record.values["image"], record.values["boxes"]
        if len(boxes) != 1:
            raise RecordError("boxes holds several boxes" if len(boxes) else "there is no box in boxes")
        size = size_of(image)
        _check_inside(boxes[0], *size)
        ids, mask, _ = tokenizer(self.max_text_len).encode(record.values["text"])
        pixels = decode_eval(image, self.image_size, self.data)
        row = {"image": pixels, "text_ids": ids, "text_mask": mask, "size": size, "box": boxes[0]}
        if not self.reads_proposals:
            return row
        found = record.values["proposals"]
        if len(found) > MAX_PROPOSALS:
            raise RecordError(f"there are more than {MAX_PROPOSALS} proposals")
        proposals = np.zeros((MAX_PROPOSALS, 4), np.float32)
        proposals[: len(found)] = np.reshape(found, (-1, 4))
        return row | {"proposals": proposals, "num_proposals": len(found)}


def _check_inside(box: list[float], width: int, height: int) -> None:
    """Raises RecordError if the box cannot be one in pixels of the image."""
    x0, y0, x1, y1 = box
    if min(x0, y0) < -_BEYOND or x1 > width + _BEYOND or y1 > height + _BEYOND:
        raise RecordError("the box in boxes leaves the image; it must be x0, y0, x1, y1 in pixels")
    if min(x0, y0) >= 0 and max(x1, y1) <= 1 < min(width, height):
        raise RecordError("the box in boxes is not in pixels but in fractions of the image")
