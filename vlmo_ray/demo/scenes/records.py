"""Scenes as image-text pairs for pre-training, and as a retrieval test.

A record has `id`, `image_id`, `image` (PNG bytes), `text`, and `forbid`: the augmentations that could make the text
untrue. Records are pure functions of the arguments, and are generated lazily.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vlmo_ray.data.schema import FORBID, PAIRS, Field, Schema
from vlmo_ray.demo.scenes.captions import Caption, captions, forbidden_augmentations
from vlmo_ray.demo.scenes.claims import is_true
from vlmo_ray.demo.scenes.render import placed
from vlmo_ray.demo.scenes.world import KINDS, Scene, scene

CAPTIONED = Schema((Field("image", "image"), Field("captions", "captions")))
SEGMENTED = Schema((Field("image", "image"), Field("mask", "mask", ("background", *KINDS))))


def png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 `[H, W, 3]` or `[H, W]` without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def declared(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows with only the columns of pairs, as `write_dataset` requires."""
    for row in rows:
        yield {name: row[name] for name in PAIRS.arrow.names if name in row}


def _pair(shown: Scene, caption: Caption) -> dict:
    return {
        "id": f"{shown.name}-0",
        "image_id": shown.name,
        "image": png(shown.image),
        "text": caption.text,
        "forbid": list(forbidden_augmentations(caption)),
    }


def records(seed: int, count: int, split: str = "train", image_size: int = 64) -> Iterator[dict]:
    """The first `count` scenes of a split with a caption each; `id` is "scene-<split>-<index>-0"."""
    for index in range(count):
        shown = scene(seed, index, split, image_size)
        yield _pair(shown, captions(shown)[0])


def captioned(seed: int, count: int, split: str = "train", image_size: int = 64, n: int = 5) -> Iterator[dict]:
    """The first `count` scenes of a split, each with `n` captions, of `CAPTIONED`."""
    for index in range(count):
        shown = scene(seed, index, split, image_size)
        found = captions(shown, n)
        forbidden = {name for caption in found for name in forbidden_augmentations(caption)}
        row = {"id": shown.name, "image_id": shown.name, "image": png(shown.image)}
        yield row | {"captions": [c.text for c in found], "forbid": [name for name in FORBID if name in forbidden]}


def segmented(seed: int, count: int, split: str = "train", image_size: int = 64) -> Iterator[dict]:
    """The first `count` scenes of a split with the kind of shape of each pixel, of `SEGMENTED`."""
    for index in range(count):
        shown = scene(seed, index, split, image_size)
        yield {"id": shown.name, "image_id": shown.name, "image": png(shown.image), "mask": png(mask_of(shown))}


def mask_of(shown: Scene) -> np.ndarray:
    """uint8 [H,W]: 0 is the background, 1 + i the kind i of `KINDS`. A pixel belongs to a shape that covers half of
    it."""
    mask = np.zeros((shown.image_size, shown.image_size), np.uint8)
    for shape in shown.shapes:
        alpha, window = placed(shape, shown.image_size)
        mask[window][alpha[..., 0] >= 0.5] = 1 + KINDS.index(shape.kind)
    return mask


def retrieval_set(seed: int, n: int = 200, image_size: int = 64) -> list[tuple[Scene, Caption]]:
    """`n` evaluation scenes, each with a caption that is true of that scene and false of the other `n` - 1.

    So retrieval has one right answer in both directions. Each caption names the background and the colour and kind of
    at least one shape. About a third of the scenes are `held_out`. Every caption is checked against every scene, so the
    time grows with the square of `n`: 0.1 s for 200.
    """
    chosen: list[tuple[Scene, Caption]] = []
    index = 0
    while len(chosen) < n:
        shown = scene(seed, index, "eval", image_size)
        index += 1
        if any(is_true(other.claim, shown) for _, other in chosen):
            continue
        for caption in captions(shown, 6):
            claim = caption.claim
            tells = claim.background and any(described.colour and described.kind for described in claim.shapes)
            if tells and not any(is_true(claim, other) for other, _ in chosen):
                chosen.append((shown, caption))
                break
    return chosen


def retrieval_records(seed: int, n: int = 200, image_size: int = 64) -> Iterator[dict]:
    """`retrieval_set` as image-text pairs, with the column `held_out` (bool)."""
    for shown, caption in retrieval_set(seed, n, image_size):
        yield {**_pair(shown, caption), "held_out": shown.held_out}
