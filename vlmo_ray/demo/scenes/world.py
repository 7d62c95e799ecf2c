"""Scene graphs: coloured shapes of two sizes at places of a 3 x 3 grid, as pure functions of a seed.

    >>> scene(seed=1, index=7).image.shape
    (64, 64, 3)

Some combinations of colour and kind, `HELD_OUT`, never occur in the training split, so evaluation can tell composition
from memory. Every colour and every kind is held out in exactly one combination and seen in seven others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import dist, hypot

import numpy as np

from vlmo_ray import rng
from vlmo_ray.demo.scenes.render import OUTLINES, PALETTE, PATTERN_VARIANTS, PATTERNS, paint
from vlmo_ray.errors import UserError

KINDS = tuple(OUTLINES)
SHAPE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUND_COLOURS = ("black", "gray", "white", "brown", "blue", "green", "yellow", "pink")
SIZES = ("small", "large")
HELD_OUT = frozenset((colour, KINDS[(3 * i + 1) % 8]) for i, colour in enumerate(SHAPE_COLOURS))
COMBINATIONS = tuple((colour, kind) for colour in SHAPE_COLOURS for kind in KINDS)
SEEN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)
SPLITS = ("train", "eval")
HELD_OUT_SHARE = 1 / 3  # of evaluation scenes

_RADII = {"small": (0.14, 0.15), "large": (0.22, 0.235)}
_REACH = 1.16  # the corners of a square lie this many radii from its centre
_BANDS = ((0.0, 0.29), (0.42, 0.58), (0.71, 1.0))  # where centres may be in each row or column, off the grid lines
_MIN_CONTRAST = 118  # between a shape and the background: a distance in RGB


@dataclass(frozen=True)
class Shape:
    """One shape; `row` and `col` are its cell of the 3 x 3 grid, from the top left."""

    kind: str
    colour: str
    size: str
    row: int
    col: int
    x: float  # centre and radius as fractions of the image's side
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    colour: str
    pattern: str
    variant: int  # which drawing of the pattern; never named


@dataclass(frozen=True)
class Scene:
    """A scene graph; its image is painted on first use.

    `shapes[0]` is the main shape. If there are several shapes, it is the only large one.
    """

    name: str  # unique within a seed; texture and captions are drawn from it
    seed: int
    split: str
    background: Background
    shapes: tuple[Shape, ...]
    image_size: int

    @property
    def held_out(self) -> bool:
        """Whether a combination of colour and kind occurs that no training scene has."""
        return any((s.colour, s.kind) in HELD_OUT for s in self.shapes)

    @cached_property
    def image(self) -> np.ndarray:
        """RGB, uint8 `[H, W, 3]`."""
        draw = rng.generator(self.seed, f"scene-texture/{self.name}", 0, 0)
        return paint(self.background, self.shapes, self.image_size, draw)


# colour of a shape -> backgrounds on which it is clearly visible
_BACKGROUNDS_OF = {
    c: {b for b in BACKGROUND_COLOURS if dist(PALETTE[c], PALETTE[b]) >= _MIN_CONTRAST} for c in SHAPE_COLOURS
}


def pick(draw: np.random.Generator, options):
    """One of a sequence, all equally likely (`Generator.choice` is twenty times slower)."""
    return options[int(draw.integers(len(options)))]


def _place(draw: np.random.Generator, sizes: list[str]) -> list[tuple[int, int, float, float, float]] | None:
    """(row, column, x, y, radius) of each shape, none touching another; None if the attempt failed."""
    placed: list[tuple[int, int, float, float, float]] = []
    for size in sizes:
        radius = pick(draw, _RADII[size])
        margin = _REACH * radius - 0.02  # a corner may lie on the edge of the image
        for _ in range(8):
            row, col = divmod(int(draw.integers(9)), 3)
            (x_low, x_high), (y_low, y_high) = _BANDS[col], _BANDS[row]
            x = float(draw.uniform(max(x_low, margin), min(x_high, 1 - margin)))
            y = float(draw.uniform(max(y_low, margin), min(y_high, 1 - margin)))
            if all(hypot(x - u, y - v) > _REACH * (radius + r) and (row, col) != (i, j) for i, j, u, v, r in placed):
                placed.append((row, col, x, y, radius))
                break
        else:
            return None
    return placed


def sample_scene(
    draw: np.random.Generator,
    seed: int,
    name: str,
    split: str,
    image_size: int,
    required: tuple[str, str] | None = None,
) -> Scene:
    """A scene from the generator. `required` is the (colour, kind) that one of its shapes must have."""
    count = 1 + int(np.searchsorted((0.35, 0.75), draw.random()))
    if split == "eval" and draw.random() < HELD_OUT_SHARE and (required is None or count > 1):
        extra = pick(draw, sorted(HELD_OUT))
    else:
        extra = None
    combinations = list(dict.fromkeys(pair for pair in (required, extra) if pair))
    while len(combinations) < count:
        pair = pick(draw, SEEN)
        if pair not in combinations:
            combinations.append(pair)
    combinations = [combinations[i] for i in draw.permutation(count)]
    free = set.intersection(*(_BACKGROUNDS_OF[colour] for colour, _ in combinations))
    pattern = "plain" if draw.random() < 0.4 else pick(draw, PATTERNS[1:])
    colour = pick(draw, [b for b in BACKGROUND_COLOURS if b in free])
    background = Background(colour, pattern, int(draw.integers(PATTERN_VARIANTS)))
    first = "large" if count > 1 or draw.random() < 0.6 else "small"
    sizes = [first] + ["small"] * (count - 1)
    while (places := _place(draw, sizes)) is None:
        pass
    shapes = tuple(
        Shape(kind, colour, size, *place)
        for (colour, kind), size, place in zip(combinations, sizes, places, strict=True)
    )
    return Scene(name, seed, split, background, shapes, image_size)


def check_arguments(split: str, image_size: int) -> None:
    """Raises UserError for an unknown split, and for an image size at which shapes cannot be told apart."""
    if split not in SPLITS:
        raise UserError(f'There is no scene split "{split}"; use "train" or "eval".')
    if image_size < 16:
        raise UserError(f"Scenes of {image_size} pixels are too small to show their shapes; use 16 or more.")


def scene(seed: int, index: int, split: str = "train", image_size: int = 64) -> Scene:
    """Scene `index` of a split: 1 to 3 shapes that do not touch, no two alike in both colour and kind.

    A pure function of its arguments. Graph and captions do not depend on `image_size`. A third of the evaluation scenes
    contain one combination of `HELD_OUT`; training scenes contain none.
    """
    check_arguments(split, image_size)
    draw = rng.generator(seed, f"scene/{split}", 0, index)
    return sample_scene(draw, seed, f"scene-{split}-{index:07d}", split, image_size)
