"""What a caption says, in a form whose truth can be checked against any scene graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

from vlmo_ray.demo.scenes.world import Scene, Shape


@dataclass(frozen=True)
class ShapeClaim:
    """There is a shape with these attributes; None claims nothing.

    Columns 0, 1, 2 are left, centre, right and rows 0, 1, 2 top, centre, bottom: "on the left" is
    `col=0`, "in the top left" `row=0, col=0`, "in the middle" `row=1, col=1`.
    """

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    row: int | None = None
    col: int | None = None

    def fits(self, shape: Shape) -> bool:
        return (
            (self.kind is None or self.kind == shape.kind)
            and (self.colour is None or self.colour == shape.colour)
            and (self.size is None or self.size == shape.size)
            and (self.row is None or self.row == shape.row)
            and (self.col is None or self.col == shape.col)
        )


@dataclass(frozen=True)
class Claim:
    """All of: the background, different shapes that fit `shapes`, a relation, the number of shapes.

    `relation` ("left of", "right of", "above", "below") holds from the first of `shapes` to the second.
    It compares columns or rows of the grid, so that it is never a matter of a few pixels.
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
    if claim.background is not None and claim.background != scene.background.colour:
        return False
    if claim.pattern is not None and claim.pattern != scene.background.pattern:
        return False
    if claim.count is not None and claim.count != len(scene.shapes):
        return False
    return any(
        all(part.fits(shape) for part, shape in zip(claim.shapes, chosen, strict=True))
        and (claim.relation is None or RELATIONS[claim.relation](chosen[0], chosen[1]))
        for chosen in permutations(scene.shapes, len(claim.shapes))
    )


def mirrored(scene: Scene) -> Scene:
    """The scene graph after a horizontal flip of the image (its texture is drawn anew)."""
    shapes = tuple(replace(s, col=2 - s.col, x=1 - s.x) for s in scene.shapes)
    return replace(scene, shapes=shapes)
