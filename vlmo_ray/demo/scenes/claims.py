"""What a caption says, in a form whose truth can be checked against any scene graph."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from vlmo_ray.demo.scenes.world import Scene, Shape


@dataclass(frozen=True)
class ShapeClaim:
    """There is a shape with these attributes; an attribute that is None is not claimed.

    Columns 0, 1, 2 are left, centre, right; rows 0, 1, 2 are top, centre, bottom. "On the left" is `col=0`, "in the
    top left" is `row=0, col=0`, "in the middle" is `row=1, col=1`.
    """

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    row: int | None = None
    col: int | None = None

    def fits(self, shape: Shape) -> bool:
        return all(claimed in (None, getattr(shape, name)) for name, claimed in vars(self).items())


@dataclass(frozen=True)
class Claim:
    """A conjunction: the background, different shapes that fit `shapes`, a relation, the number of shapes.

    `relation`, a key of `RELATIONS`, holds from the first of `shapes` to the second. It compares columns or rows of the
    grid, so it never depends on a few pixels.
    """

    shapes: tuple[ShapeClaim, ...] = ()
    background: str | None = None
    pattern: str | None = None
    relation: str | None = None
    count: int | None = None


RELATIONS = {
    "left of": lambda a, b: a.col < b.col,
    "right of": lambda a, b: a.col > b.col,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the scene graph makes the claim true."""
    told = (claim.background, claim.pattern, claim.count)
    actual = (scene.background.colour, scene.background.pattern, len(scene.shapes))
    if any(claimed not in (None, value) for claimed, value in zip(told, actual, strict=True)):
        return False
    return any(
        all(described.fits(shape) for described, shape in zip(claim.shapes, chosen, strict=True))
        and (claim.relation is None or RELATIONS[claim.relation](chosen[0], chosen[1]))
        for chosen in permutations(scene.shapes, len(claim.shapes))
    )
