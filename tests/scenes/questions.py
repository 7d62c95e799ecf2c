"""Questions with one right answer each, and true or false statements about a pair of scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmo_ray import rng
from vlmo_ray.demo.scenes.captions import article
from vlmo_ray.demo.scenes.claims import RELATIONS, Claim, ShapeClaim, is_true
from vlmo_ray.demo.scenes.render import PATTERNS
from vlmo_ray.demo.scenes.world import (
    BACKGROUND_COLOURS,
    COMBINATIONS,
    HELD_OUT,
    KINDS,
    SEEN,
    SHAPE_COLOURS,
    SIZES,
    Scene,
    check_arguments,
    pick,
    sample_scene,
)

ANSWERS = tuple(
    dict.fromkeys(("yes", "no", "1", "2", "3", *SHAPE_COLOURS, *BACKGROUND_COLOURS, *KINDS, *SIZES, *PATTERNS))
)

_SIDES = {"on the left": ("col", 0), "on the right": ("col", 2), "at the top": ("row", 0), "at the bottom": ("row", 2)}


def _only(shapes, **attributes):
    """The one shape with these attributes, or None where there are none or several."""
    found = [s for s in shapes if all(getattr(s, name) == value for name, value in attributes.items())]
    return found[0] if len(found) == 1 else None


def _combinations(split: str) -> tuple[tuple[str, str], ...]:
    # training texts never mention a held-out combination: "no" would be its only answer
    return SEEN if split == "train" else COMBINATIONS


def _absent(scene: Scene, draw: np.random.Generator) -> tuple[str, str]:
    """A combination that the scene lacks, usually one that shares its colour or kind with a shape."""
    present = {(s.colour, s.kind) for s in scene.shapes}
    absent = [pair for pair in _combinations(scene.split) if pair not in present]
    if draw.random() < 0.75:
        colours, kinds = zip(*present, strict=True)
        absent = [(c, k) for c, k in absent if c in colours or k in kinds]
    return pick(draw, absent)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """All of the scene's (question, answer) pairs, answers from `ANSWERS`.

    Every question has one right answer: "the circle" is asked about only if there is one circle, "the shape on the
    left" only if one shape is in the left column. Yes/no questions come in pairs of the same form, "yes" first, so
    exactly half of them have the answer "yes".
    """
    draw = rng.generator(scene.seed, f"scene-questions/{scene.name}", 0, 0)
    shapes, background = scene.shapes, scene.background
    asked = [
        ("how many shapes are there?", str(len(shapes))),
        ("what color is the background?", background.colour),
        ("what pattern is the background?", background.pattern),
    ]
    for shape in shapes:
        if _only(shapes, kind=shape.kind):
            asked.append((f"what color is the {shape.kind}?", shape.colour))
            asked.append((f"how big is the {shape.kind}?", shape.size))
        if _only(shapes, colour=shape.colour):
            asked.append((f"what shape is {shape.colour}?", shape.kind))
    for where, (axis, value) in _SIDES.items():
        if found := _only(shapes, **{axis: value}):
            asked.append((f"which shape is {where}?", found.kind))
            asked.append((f"what color is the shape {where}?", found.colour))
    if len(shapes) > 1:
        asked.append(("what is the largest shape?", shapes[0].kind))

    def both(form: str, right: str, wrong: str) -> None:
        asked.extend([(form.format(right), "yes"), (form.format(wrong), "no")])

    main = pick(draw, shapes)
    colour, kind = _absent(scene, draw)
    both("is there {}?", article(f"{main.colour} {main.kind}"), article(f"{colour} {kind}"))
    both("is the background {}?", background.colour, pick(draw, _others(BACKGROUND_COLOURS, background.colour)))
    both("is the background {}?", background.pattern, pick(draw, _others(PATTERNS, background.pattern)))
    if _only(shapes, kind=main.kind):
        both(f"is the {main.kind} {{}}?", main.size, pick(draw, _others(SIZES, main.size)))
    named = [s for s in shapes if _only(shapes, kind=s.kind)]
    for a in named:
        for b in named:
            for relation in ("left of", "above"):
                if RELATIONS[relation](a, b):
                    text = {"left of": "to the left of", "above": "above"}[relation]
                    asked.append((f"is the {a.kind} {text} the {b.kind}?", "yes"))
                    asked.append((f"is the {b.kind} {text} the {a.kind}?", "no"))
    return asked


def _others(options: tuple[str, ...], taken: str) -> list[str]:
    return [option for option in options if option != taken]


@dataclass(frozen=True)
class PairClaim:
    """A statement about a left and a right scene.

    `form` "both", "one" (exactly one), "neither", "left", "right": of the images for which `claim` holds;
    "more" / "fewer": the left has more / fewer shapes than the right; "same number"; "same background".
    """

    form: str
    claim: Claim = Claim()  # noqa: RUF009 - immutable


def is_true_of_pair(claim: PairClaim, left: Scene, right: Scene) -> bool:
    """Whether the two scene graphs make the statement true."""
    numbers = len(left.shapes), len(right.shapes)
    holds = is_true(claim.claim, left), is_true(claim.claim, right)
    return {
        "both": all(holds),
        "one": holds[0] != holds[1],
        "neither": not any(holds),
        "left": holds[0],
        "right": holds[1],
        "more": numbers[0] > numbers[1],
        "fewer": numbers[0] < numbers[1],
        "same number": numbers[0] == numbers[1],
        "same background": left.background.colour == right.background.colour,
    }[claim.form]


_PAIR_TEXTS = {
    "both": ("both images contain {}", "there is {} in each image", "each of the two images shows {}"),
    "one": ("exactly one image contains {}", "only one of the images shows {}"),
    "neither": ("neither image contains {}", "there is no image with {}"),
    "left": ("the left image contains {}", "there is {} in the left image"),
    "right": ("the right image contains {}", "there is {} in the right image"),
    "more": ("the left image has more shapes than the right image",),
    "fewer": ("there are fewer shapes in the left image than in the right image",),
    "same number": ("both images have the same number of shapes",),
    "same background": ("the images have the same background color",),
}


def pair_statement(seed: int, index: int, split: str = "train", image_size: int = 64) -> tuple[Scene, Scene, str, bool]:
    """Two scenes, a statement about them, and whether it is true, as in NLVR2.

    The truth is drawn first, independently of the words. Scenes are then drawn until they agree with it, so the words
    alone do not reveal the answer. A pure function of its arguments.
    """
    left, right, text, truth, _ = pair_with_claim(seed, index, split, image_size)
    return left, right, text, truth


def pair_with_claim(seed: int, index: int, split: str, image_size: int) -> tuple[Scene, Scene, str, bool, PairClaim]:
    """`pair_statement` with the statement's logical form."""
    check_arguments(split, image_size)
    draw = rng.generator(seed, f"scene-pair/{split}", 0, index)
    truth = bool(draw.random() < 0.5)
    form = pick(draw, tuple(_PAIR_TEXTS))
    name = f"pair-{split}-{index:07d}"
    # a third of the evaluation statements are about a combination that training has never shown
    colour, kind = pick(draw, sorted(HELD_OUT) if split == "eval" and draw.random() < 1 / 3 else SEEN)
    claim, named = ShapeClaim(kind, colour), article(f"{colour} {kind}")
    if draw.random() < 0.3:
        claim, named = (
            (ShapeClaim(kind), article(kind))
            if draw.random() < 0.5
            else (ShapeClaim(None, colour), article(f"{colour} shape"))
        )
    pair_claim = PairClaim(form, Claim((claim,)))
    text = pick(draw, _PAIR_TEXTS[form]).format(named)
    while True:
        # the shape is put into about two scenes of three, so that false statements are nearly true
        wanted = [(colour, kind) if draw.random() < 0.65 else None for _ in range(2)]
        left, right = (
            sample_scene(draw, seed, f"{name}-{side}", split, image_size, required)
            for side, required in zip(("left", "right"), wanted, strict=True)
        )
        if is_true_of_pair(pair_claim, left, right) == truth:
            return left, right, text, truth, pair_claim
