"""Scenes as data-set records, for pre-training and for every task, and as a retrieval test.

Images are PNG bytes. Every record has `id`, `image_id`, `image` and, where it has a text, `text` and
`forbid` (the augmentations that could make the text untrue); the other columns are listed with each
function. `start` continues a data set: records of `start=0, count=5` and `start=5, count=5` are those of
`count=10`. All are functions of their arguments, and are made one by one as they are asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vlmo_ray import rng
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.demo.scenes.captions import Caption, captions, forbidden_augmentations
from vlmo_ray.demo.scenes.claims import is_true
from vlmo_ray.demo.scenes.questions import pair_statement, questions
from vlmo_ray.demo.scenes.world import KINDS, Scene, scene


def png(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W, 3]` or `[H, W]`, encoded without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def declared(rows: Iterable[dict], schema: Schema = PAIRS) -> Iterator[dict]:
    """The rows as `write_dataset` takes them: only with the columns that `schema` declares."""
    for row in rows:
        yield {name: row[name] for name in schema.arrow.names if name in row}


def _scenes(seed: int, count: int, split: str, image_size: int, start: int) -> Iterator[Scene]:
    return (scene(seed, index, split, image_size) for index in range(start, start + count))


def _pair(shown: Scene, image: bytes, caption: Caption, number: int) -> dict:
    return {
        "id": f"{shown.name}-{number}",
        "image_id": shown.name,
        "image": image,
        "text": caption.text,
        "forbid": list(forbidden_augmentations(caption)),
    }


def records(
    seed: int, count: int, split: str = "train", image_size: int = 64, captions_per_scene: int = 1, start: int = 0
) -> Iterator[dict]:
    """Image-text pairs of `count` scenes: id, image_id, image, text, forbid.

    `id` is "scene-<split>-<index>-<caption>", `image_id` the same without the caption's number.
    """
    for shown in _scenes(seed, count, split, image_size, start):
        image = png(shown.image)
        for number, caption in enumerate(captions(shown, captions_per_scene)):
            yield _pair(shown, image, caption, number)


def retrieval_set(seed: int, n: int = 200, image_size: int = 64) -> list[tuple[Scene, Caption]]:
    """`n` evaluation scenes with a caption each that is true of its own scene and of no other of them.

    So the captions differ, and retrieval has one right answer in both directions. Each caption names the
    background and at least a shape's colour and kind. About a third of the scenes are `held_out`. Every
    caption is checked against every scene, so time grows with the square of `n`: 0.1 s for 200.
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
            tells = claim.background and any(part.colour and part.kind for part in claim.shapes)
            if tells and not any(is_true(claim, other) for other, _ in chosen):
                chosen.append((shown, caption))
                break
    return chosen


def retrieval_records(seed: int, n: int = 200, image_size: int = 64) -> Iterator[dict]:
    """`retrieval_set` as image-text pairs, with the column `held_out` (bool)."""
    for shown, caption in retrieval_set(seed, n, image_size):
        yield {**_pair(shown, png(shown.image), caption, 0), "held_out": shown.held_out}


def vqa_records(
    seed: int, count: int, split: str = "train", image_size: int = 64, questions_per_scene: int = 4, start: int = 0
) -> Iterator[dict]:
    """Questions about `count` scenes: id, image_id, image, text (the question), answer, forbid.

    Up to `questions_per_scene` of each scene's questions, drawn evenly. `answer` is one of `ANSWERS`.
    """
    for shown in _scenes(seed, count, split, image_size, start):
        image = png(shown.image)
        asked = questions(shown)
        draw = rng.generator(seed, f"scene-vqa/{shown.name}", 0, 0)
        for number, i in enumerate(draw.permutation(len(asked))[:questions_per_scene]):
            question, answer = asked[i]
            yield {
                "id": f"{shown.name}-q{number}",
                "image_id": shown.name,
                "image": image,
                "text": question,
                "answer": answer,
                # a colour, a kind or a size may be what is asked for
                "forbid": list(forbidden_augmentations(f"{question} {answer}")),
            }


def nlvr2_records(seed: int, count: int, split: str = "train", image_size: int = 64, start: int = 0) -> Iterator[dict]:
    """Statements about pairs of scenes: id, image_id, image (left), image_right, text, label, forbid.

    `label` is 1 where the statement is true of the pair, else 0.
    """
    for index in range(start, start + count):
        left, right, text, truth = pair_statement(seed, index, split, image_size)
        name = left.name.removesuffix("-left")
        yield {
            "id": name,
            "image_id": name,
            "image": png(left.image),
            "image_right": png(right.image),
            "text": text,
            "label": int(truth),
            "forbid": list(forbidden_augmentations(text)),
        }


def classification_records(
    seed: int, count: int, split: str = "train", image_size: int = 64, start: int = 0
) -> Iterator[dict]:
    """Scenes with the kind of their main shape: id, image_id, image, label (index in `KINDS`), label_name."""
    for shown in _scenes(seed, count, split, image_size, start):
        yield {
            "id": shown.name,
            "image_id": shown.name,
            "image": png(shown.image),
            "label": KINDS.index(shown.label),
            "label_name": shown.label,
        }


def segmentation_records(
    seed: int, count: int, split: str = "train", image_size: int = 64, start: int = 0
) -> Iterator[dict]:
    """Scenes with a class per pixel: id, image_id, image, mask.

    `mask` is a gray PNG: 0 is background, a class like the others, else 1 + the index in `KINDS`.
    """
    for shown in _scenes(seed, count, split, image_size, start):
        yield {"id": shown.name, "image_id": shown.name, "image": png(shown.image), "mask": png(shown.mask)}
