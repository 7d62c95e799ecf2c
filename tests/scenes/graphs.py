"""Scene graphs seen in other ways: flipped, and as a mask of kinds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmo_ray.demo.scenes.render import placed
from vlmo_ray.demo.scenes.world import KINDS, Scene


def mirrored(scene: Scene) -> Scene:
    """The scene graph after a horizontal flip of the image (its texture is drawn anew)."""
    shapes = tuple(replace(s, col=2 - s.col, x=1 - s.x) for s in scene.shapes)
    return replace(scene, shapes=shapes)


def mask_of(scene: Scene) -> np.ndarray:
    """uint8 `[H, W]`: 1 + the index in `KINDS` of the shape that covers at least half of the pixel.

    0 is background, a class like the others; the hole of a ring is background.
    """
    mask = np.zeros((scene.image_size, scene.image_size), np.uint8)
    for shape in scene.shapes:
        coverage, window = placed(shape, scene.image_size)
        mask[window][coverage[..., 0] >= 0.5] = 1 + KINDS.index(shape.kind)
    return mask
