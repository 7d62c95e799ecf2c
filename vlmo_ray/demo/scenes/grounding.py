"""Scenes for visual grounding: expressions that each refer to one shape, and the shape's box.

Only scenes with two shapes or more have expressions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_up
from itertools import islice, product

import numpy as np

from vlmo_ray import rng
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.demo.scenes.captions import ADJECTIVES, NOUNS, forbidden_augmentations
from vlmo_ray.demo.scenes.claims import ShapeClaim
from vlmo_ray.demo.scenes.records import png
from vlmo_ray.demo.scenes.render import placed
from vlmo_ray.demo.scenes.world import Scene, Shape, pick, scene

GROUNDING = Schema((Field("image", "image"), Field("text", "text"), Field("boxes", "boxes")))


@dataclass(frozen=True)
class Expression:
    text: str
    claim: ShapeClaim
    shape: Shape  # the only one of its scene that fits the claim


def expressions(scene: Scene) -> list[Expression]:
    """One for every shape, such as "the small red circle"; it names attributes that tell the shape from the others.

    All sets of attributes that do so are equally likely. No two shapes of a scene are alike in both colour and kind.
    """
    draw = rng.generator(scene.seed, f"scene-expressions/{scene.name}", 0, 0)
    found = []
    for shape in scene.shapes:
        attributes = product((None, shape.kind), (None, shape.colour), (None, shape.size))
        claims = [ShapeClaim(kind, colour, size) for kind, colour, size in attributes]
        claim = pick(draw, [claim for claim in claims if sum(map(claim.fits, scene.shapes)) == 1])
        noun = pick(draw, NOUNS[claim.kind]) if claim.kind else pick(draw, ("shape", "object"))
        adjective = pick(draw, ADJECTIVES[claim.size]) if claim.size else ""
        words = ("the", adjective, claim.colour, noun)
        found.append(Expression(" ".join(word for word in words if word), claim, shape))
    return found


def box_of(shape: Shape, image_size: int) -> list[int]:
    """x0, y0, x1, y1: around all pixels that the shape covers a part of."""
    coverage, (rows, cols) = placed(shape, image_size)
    y, x = np.nonzero(coverage[..., 0])
    left, top = cols.start, rows.start
    return [int(edge) for edge in (left + x.min(), top + y.min(), left + x.max() + 1, top + y.max() + 1)]


def records(seed: int, count: int, split: str = "train", image_size: int = 64) -> Iterator[dict]:
    """The first `count` expressions of a split, of the schema `GROUNDING`; `id` is "scene-<split>-<index>-<shape>"."""
    scenes = (scene(seed, index, split, image_size) for index in count_up())
    return islice((record for shown in scenes if len(shown.shapes) > 1 for record in _records(shown)), count)


def _records(shown: Scene) -> Iterator[dict]:
    image = png(shown.image)
    for number, expression in enumerate(expressions(shown)):
        yield {
            "id": f"{shown.name}-{number}",
            "image_id": shown.name,
            "image": image,
            "text": expression.text,
            "boxes": [box_of(expression.shape, shown.image_size)],
            "forbid": list(forbidden_augmentations(expression.text)),
        }
