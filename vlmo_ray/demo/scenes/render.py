"""Paints a scene graph: anti-aliased shapes on a textured background.

Shapes are blended from cached coverage templates centred on a pixel corner, so a scene costs a few small NumPy
operations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the graph imports this module
    from vlmo_ray.demo.scenes.world import Background, Shape

PALETTE = {
    "red": (215, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 160, 65),
    "blue": (40, 80, 225),
    "purple": (130, 40, 170),
    "pink": (250, 150, 205),
    "white": (246, 246, 246),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "brown": (115, 70, 30),
}
PATTERNS = ("plain", "striped", "spotted", "checked")
PATTERN_VARIANTS = 3  # drawings of each pattern: directions of stripes, offsets of spots and checks
_SUPERSAMPLING = 8


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius, inner, sector = np.hypot(x, y), 0.45, np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # from the axis of the nearest point
    # in polar coordinates the edge runs from the point (1, 0) to the notch at (inner, sector)
    edge_x, edge_y = inner * np.cos(sector) - 1, inner * np.sin(sector)
    return radius * (np.cos(angle) * edge_y - np.sin(angle) * edge_x) <= edge_y


# Whether (x, y) is inside, x to the right and y down in [-1, 1]. Every outline is its own mirror image, so a
# horizontal flip never changes a kind.
OUTLINES = {
    "circle": lambda x, y: x**2 + y**2 <= 0.93**2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.82,
    "triangle": lambda x, y: (y <= 0.78) & (y + 0.95 >= np.abs(x) * (1.73 / 0.96)),
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.34) & (np.maximum(np.abs(x), np.abs(y)) <= 0.95),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.52**2),
    "diamond": lambda x, y: np.abs(x) / 0.72 + np.abs(y) <= 1,
    "heart": lambda x, y: ((1.2 * x) ** 2 + (0.15 - 1.2 * y) ** 2 - 1) ** 3 <= (1.2 * x) ** 2 * (0.15 - 1.2 * y) ** 3,
}


@lru_cache(maxsize=1024)
def coverage(kind: str, radius_px: float) -> np.ndarray:
    """Share of each pixel inside the shape, float32 `[2R, 2R, 1]` with `R = ceil(radius_px)`."""
    half = int(np.ceil(radius_px))
    n = 2 * half * _SUPERSAMPLING
    grid = ((np.arange(n) + 0.5) / _SUPERSAMPLING - half) / radius_px
    inside = OUTLINES[kind](grid[None, :], grid[:, None])
    blocks = inside.reshape(2 * half, _SUPERSAMPLING, 2 * half, _SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[..., None]


@lru_cache(maxsize=256)
def pattern_mask(pattern: str, variant: int, size: int) -> np.ndarray:
    """Where the background takes its second tone, float32 `[size, size, 1]` of 0 and 1."""
    y, x = np.mgrid[:size, :size] * (8 / size)  # 8 units across
    if pattern == "plain":
        mask = np.zeros((size, size), bool)
    elif pattern == "striped":
        mask = (x, y, (x + y) / np.sqrt(2))[variant] % 2 < 1
    elif pattern == "checked":
        mask = ((x + 0.5 * variant) % 2 < 1) ^ ((y + 0.5 * variant) % 2 < 1)
    else:
        shift = 0.6 * variant
        mask = np.hypot((x + shift) % 2 - 1, (y + shift) % 2 - 1) < 0.6
    return mask[..., None].astype(np.float32)


def placed(shape: Shape, size: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The coverage of a shape in an image of `size` pixels a side, and the window of the image that it is for."""
    alpha = coverage(shape.kind, shape.radius * size)
    half = len(alpha) // 2
    left, top = (min(max(round(c * size), half), size - half) - half for c in (shape.x, shape.y))
    return alpha, (slice(top, top + 2 * half), slice(left, left + 2 * half))


def paint(background: Background, shapes: tuple[Shape, ...], size: int, draw: np.random.Generator) -> np.ndarray:
    """The image, uint8 `[size, size, 3]`; `draw` gives the texture."""
    tone = np.asarray(PALETTE[background.colour], np.float32)
    # the second tone lies towards the middle of the range, far enough to be visible on black and on white
    step = np.where(tone.mean() < 110, 32, -32).astype(np.float32)
    image = tone + step * pattern_mask(background.pattern, background.variant, size)
    jitter = draw.uniform(-12, 12, (len(shapes), 3)).astype(np.float32)
    for shape, shift in zip(shapes, jitter, strict=True):
        alpha, window = placed(shape, size)
        image[window] += alpha * (np.asarray(PALETTE[shape.colour], np.float32) + shift - image[window])
    slope_x, slope_y = draw.uniform(-10, 10, 2).astype(np.float32)  # uneven light
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = slope_x * ramp[None, :, None] + slope_y * ramp[:, None, None]
    noise = draw.standard_normal((size, size, 3), dtype=np.float32)
    return np.clip(image + light + 4 * noise, 0, 255).astype(np.uint8)
