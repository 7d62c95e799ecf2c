"""An image alone, with masked patches: for the vision stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import image_column, image_row
from vlmo_ray.data.encoders import Column, Draw, Encoder, Row
from vlmo_ray.data.schema import Record

_UNIT = 2  # patches a side of what is masked at random together
_LEAST_BLOCK, _ASPECT, _TRIES = 16, 0.3, 10  # of BEiT's blocks


@dataclass(frozen=True)
class MaskedImages(Encoder):
    """image uint8 `[3, H, W]`; masked bool `[patches]`, row by row.

    In an evaluation the masked patches are a function of the record's id.
    """

    image_size: int
    grid: int  # patches a side
    mask: Literal["random", "block"]
    share: float
    data: DataConfig

    fields = ("image",)

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"image": image_column(self.image_size), "masked": Column("bool", (self.grid**2,))}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        image = image_row(record, "image", self.image_size, self.data, draw)
        generator = (draw or Draw(0, 0, rng.hash_text(record.id))).generator("patches")
        chosen = (random_units if self.mask == "random" else blocks)(self.grid, self.share, generator)
        return {"image": image, "masked": chosen.reshape(-1)}


def random_units(grid: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """bool `[grid, grid]`: a share of the units of 2 x 2 patches (SimMIM, Xie et al. 2022), at least one of them."""
    side = -(-grid // _UNIT)
    count = max(1, round(share * side**2))
    chosen = np.zeros(side**2, bool)
    chosen[np.argsort(generator.random(side**2), kind="stable")[:count]] = True
    return chosen.reshape(side, side).repeat(_UNIT, 0).repeat(_UNIT, 1)[:grid, :grid]


def blocks(grid: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """bool `[grid, grid]`: rectangles until a share of the patches is reached, or no further one fits (BEiT,
    algorithm 1). At least one patch, and never more than the share."""
    wanted = max(1, round(share * grid**2))
    chosen = np.zeros((grid, grid), bool)
    while (left := wanted - int(chosen.sum())) > 0:
        for _ in range(_TRIES):
            area = generator.uniform(min(_LEAST_BLOCK, left), left)
            aspect = math.exp(generator.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
            height, width = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
            top, first = (int(generator.integers(0, max(1, grid - n + 1))) for n in (height, width))
            block = chosen[top : top + height, first : first + width]
            if height <= grid and width <= grid and 0 < block.size - int(block.sum()) <= left:
                block[:] = True
                break
        else:
            break
    if not chosen.any():
        chosen[tuple(generator.integers(0, grid, 2))] = True
    return chosen
