"""Scene graphs seen in another way: flipped."""

from __future__ import annotations

from dataclasses import replace

from vlmo_ray.demo.scenes.world import Scene


def mirrored(scene: Scene) -> Scene:
    """The scene graph after a horizontal flip of the image (its texture is drawn anew)."""
    shapes = tuple(replace(s, col=2 - s.col, x=1 - s.x) for s in scene.shapes)
    return replace(scene, shapes=shapes)
