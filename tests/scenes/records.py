"""Scenes as records of other tasks than pre-training.

Images are PNG bytes. Records with a text have `forbid`, the augmentations that could make the text untrue. `start`
continues a data set: `start=0, count=5` and `start=5, count=5` together equal `count=10`.
"""

from __future__ import annotations

from collections.abc import Iterator

from scenes.questions import pair_statement, questions
from vlmo_ray import rng
from vlmo_ray.demo.scenes.captions import forbidden_augmentations
from vlmo_ray.demo.scenes.records import png
from vlmo_ray.demo.scenes.world import KINDS, Scene, scene


def _scenes(seed: int, count: int, split: str, image_size: int, start: int) -> Iterator[Scene]:
    return (scene(seed, index, split, image_size) for index in range(start, start + count))


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
            "label": KINDS.index(shown.shapes[0].kind),
            "label_name": shown.shapes[0].kind,
        }
