"""True English sentences about a scene, their logical form, and the augmentations they forbid.

Every word is one WordPiece of the bert-base-uncased vocabulary. No caption has more than `MAX_TOKENS` tokens, so small
models can read all of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vlmo_ray import rng
from vlmo_ray.demo.scenes.claims import RELATIONS, Claim, ShapeClaim
from vlmo_ray.demo.scenes.world import BACKGROUND_COLOURS, KINDS, SHAPE_COLOURS, SIZES, Scene, Shape, pick

MAX_TOKENS = 20  # with [CLS] and [SEP]

NOUNS = {kind: (kind,) for kind in KINDS} | {
    "circle": ("circle", "circle", "disc"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus"),
}
ADJECTIVES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PATTERN_WORDS = {
    "plain": ("plain",),
    "striped": ("striped",),
    "spotted": ("spotted", "dotted"),
    "checked": ("checked",),
}
NUMBERS = {1: "one", 2: "two", 3: "three"}
_ROWS = {0: ("top", "upper"), 2: ("bottom", "lower")}
_COLS = {0: "left", 2: "right"}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Caption:
    text: str
    claim: Claim


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join(parts: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return " and ".join(([", ".join(parts[:-1])] if parts[1:] else []) + parts[-1:])


def num_tokens(text: str) -> int:
    """The tokens of a text whose words are all single WordPieces, [CLS] and [SEP] included."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 2


_SIDES = {"left", "right"}
_COLOURS = {"color", *SHAPE_COLOURS, *BACKGROUND_COLOURS}
_SHAPES = {"shape", "shapes", "something", "object", "objects", *SIZES}
_SHAPES |= {word for words in (*NOUNS.values(), *ADJECTIVES.values()) for word in words}


def forbidden_augmentations(text: str | Caption) -> tuple[str, ...]:
    """The augmentations that could make a caption, question or statement untrue, in a fixed order.

    * "crop" if the text names a shape, a size or a number: the crop may cut the shape out or enlarge it.
    * "flip" if it names left or right. "The left image" of a pair does not count, because a flip acts within an image.
      Top and bottom survive, and every kind is its own mirror image.
    * "color" if it names or asks for a colour: brightness or equalization may turn it into another.
    * "geometric" (rotate, shear, translate) if it names a shape: the shape may leave the image, change place, or turn
      from a square into a diamond. Also if it calls the background plain: the corners are filled with gray.
    """
    text = text.text if isinstance(text, Caption) else text
    words = set(re.findall(r"\w+", re.sub(r"\b(left|right) image\b", "image", text)))
    rules = {
        "crop": words & _SHAPES,
        "flip": words & _SIDES,
        "color": words & _COLOURS,
        "geometric": words & (_SHAPES | {"plain"}),
    }
    return tuple(name for name, named in rules.items() if named)


class _Writer:
    """Writes one caption; random draws decide what it names and how."""

    def __init__(self, scene: Scene, draw: np.random.Generator):
        self.scene, self.draw = scene, draw

    def pick(self, options):
        return pick(self.draw, options)

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def shape(self, shape: Shape, size=0.25, colour=1.0, kind=1.0) -> tuple[str, ShapeClaim]:
        """A noun phrase that names each attribute with the given probability, and its claim."""
        named = ShapeClaim(
            shape.kind if self.chance(kind) else None,
            shape.colour if self.chance(colour) else None,
            shape.size if self.chance(size) else None,
        )
        adjective = self.pick(ADJECTIVES[named.size]) if named.size else ""
        noun = self.pick(NOUNS[named.kind]) if named.kind else self.pick(("shape", "object"))
        if named.kind is None and named.colour and not adjective and self.chance(0.3):
            return f"something {named.colour}", named
        if named.colour and self.chance(0.12):
            return article(f"{adjective} {noun} in {named.colour}".strip()), named
        return article(" ".join(word for word in (adjective, named.colour, noun) if word)), named

    def background(self, colour=1.0, pattern=0.25) -> tuple[str, dict]:
        """A noun phrase, and the fields of `Claim` that it sets."""
        named, words = {}, []
        if self.chance(colour):
            named["background"] = self.scene.background.colour
            words.append(named["background"])
        if self.chance(pattern):
            named["pattern"] = self.scene.background.pattern
            words.append(self.pick(PATTERN_WORDS[named["pattern"]]))
        words = words if self.chance(0.5) else words[::-1]
        return article(" ".join([*words, self.pick(("background", "background", "backdrop"))])), named

    def place(self, shape: Shape) -> tuple[str, dict]:
        """Where the shape is, and the fields of `ShapeClaim` that say so; of a corner sometimes only row or column."""
        row, col = shape.row, shape.col
        if row == col == 1:
            return self.pick(("in the middle", "in the center")), {"row": 1, "col": 1}
        if row != 1 and col != 1 and self.chance(0.6):
            words = f"{self.pick(_ROWS[row])} {_COLS[col]}"
            return self.pick((f"in the {words}", f"at the {words}", f"in the {words} corner")), {"row": row, "col": col}
        if col == 1 or (row != 1 and self.chance(0.5)):
            return f"at the {_ROWS[row][0]}", {"row": row}
        return self.pick(("on the", "at the")) + f" {_COLS[col]}", {"col": col}

    def on(self, subject: str, background: str) -> str:
        """Shapes and background in one sentence."""
        options = (
            f"{subject} {self.pick(('on', 'on', 'over', 'against'))} {background}",
            f"{self.pick(('a picture of', 'an image of', 'a drawing of'))} {subject} on {background}",
            f"{background} with {subject}",
            f"on {background}, {subject}",
        )
        return self.pick((options[0], *options))

    def everything(self) -> Caption:
        """Every shape and the background."""
        order = self.draw.permutation(len(self.scene.shapes))
        phrases = [self.shape(self.scene.shapes[i]) for i in order]
        background, fields = self.background()
        subject = join([text for text, _ in phrases])
        if self.chance(0.12):
            fields["count"] = len(phrases)
            noun = "shape" if len(phrases) == 1 else "shapes"
            text = f"{NUMBERS[len(phrases)]} {noun} on {background}: {subject}"
        else:
            text = self.on(subject, background)
        return Caption(text, Claim(tuple(claim for _, claim in phrases), **fields))

    def main(self) -> Caption:
        """The main shape and the background."""
        subject, claim = self.shape(self.scene.shapes[0], size=0.6)
        background, fields = self.background(pattern=0.4)
        return Caption(self.on(subject, background), Claim((claim,), **fields))

    def placed(self) -> Caption:
        """One or two shapes with their places, and the background."""
        phrases, claims = [], []
        for i in self.draw.permutation(len(self.scene.shapes))[: 1 + self.chance(0.4)]:
            subject, claim = self.shape(self.scene.shapes[i], size=0.1)
            where, cell = self.place(self.scene.shapes[i])
            phrases.append(f"{subject} {where}")
            claims.append(ShapeClaim(claim.kind, claim.colour, claim.size, **cell))
        background, fields = self.background(pattern=0.1)
        subject = join(phrases)
        text = f"{background} with {subject}" if self.chance(0.5) else f"{subject}, on {background}"
        return Caption(text, Claim(tuple(claims), **fields))

    def related(self) -> Caption:
        """A shape left of, right of, above or below another, by their rows and columns."""
        shapes = self.scene.shapes
        options = [(a, b, name) for a in shapes for b in shapes for name, holds in RELATIONS.items() if holds(a, b)]
        if not options:  # a single shape
            return self.placed()
        a, b, relation = self.pick(options)
        (first, first_claim), (second, second_claim) = self.shape(a, size=0.1), self.shape(b, size=0.1)
        text = f"{first} {self.pick(_RELATION_WORDS[relation])} {second}"
        background, fields = self.background(pattern=0.0) if self.chance(0.85) else ("", {})
        text = f"{text} on {background}" if background else text
        return Caption(text, Claim((first_claim, second_claim), relation=relation, **fields))

    def vague(self) -> Caption:
        """Only a few attributes: of some shapes, of the background, or a number."""
        style = self.draw.integers(4)
        if style == 0:
            background, fields = self.background(pattern=0.7)
            return Caption(background, Claim(**fields))
        if style == 1:
            count = len(self.scene.shapes)
            noun = self.pick(("shape", "object")) + "s" * (count > 1)
            background, fields = self.background()
            return Caption(f"{NUMBERS[count]} {noun} on {background}", Claim(count=count, **fields))
        order = self.draw.permutation(len(self.scene.shapes))
        phrases = [self.shape(self.scene.shapes[i], size=0.2, colour=0.6, kind=0.6) for i in order]
        subject, claims = join([text for text, _ in phrases]), tuple(claim for _, claim in phrases)
        if style == 2:
            return Caption(subject, Claim(claims))
        background, fields = self.background(colour=0.7, pattern=0.5)
        return Caption(self.on(subject, background), Claim(claims, **fields))

    def caption(self) -> Caption:
        kinds = (self.everything, self.main, self.placed, self.related, self.vague)
        while True:
            written = kinds[int(np.searchsorted((0.5, 0.7, 0.82, 0.94), self.draw.random()))]()
            if num_tokens(written.text) <= MAX_TOKENS:
                return written


def captions(scene: Scene, n: int = 1) -> list[Caption]:
    """`n` different true captions; the first one does not depend on `n`.

    About half name every shape and the background, a fifth the main shape and the background. Others give places or
    relations, and a few say little.
    """
    assert 1 <= n <= 32, "a scene has a limited number of different captions"
    writer = _Writer(scene, rng.generator(scene.seed, f"scene-captions/{scene.name}", 0, 0))
    found: dict[str, Caption] = {}
    while len(found) < n:
        written = writer.caption()
        found.setdefault(written.text, written)
    return list(found.values())
