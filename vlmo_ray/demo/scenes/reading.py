"""What a sentence about a scene says of colours and kinds: the way back from `captions`, for sentences of a model."""

from __future__ import annotations

import re

from vlmo_ray.demo.scenes.captions import ADJECTIVES, NOUNS, PATTERN_WORDS
from vlmo_ray.demo.scenes.claims import Claim, ShapeClaim
from vlmo_ray.demo.scenes.world import BACKGROUND_COLOURS, SHAPE_COLOURS

_KIND_OF = {word: kind for kind, words in NOUNS.items() for word in words}
_SIZE_OF = {word: size for size, words in ADJECTIVES.items() for word in words}
_PATTERN_OF = {word: pattern for pattern, words in PATTERN_WORDS.items() for word in words}
_VAGUE = ("shape", "shapes", "object", "objects", "something")
_GROUNDS = ("background", "backdrop")


def read(text: str) -> Claim:
    """The claim of a text as to shapes (kind, colour, size) and background (colour, pattern); places, relations and
    numbers are not read.

    A word that is not of this language says nothing. An adjective belongs to the noun after it, or with "in" or after
    "something" to the one before.
    """
    shapes: list[ShapeClaim] = []
    background: str | None = None
    on: str | None = None  # the pattern of the background
    colour = size = pattern = None
    words = re.findall(r"\w+", text.lower())
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if word in (*SHAPE_COLOURS, *BACKGROUND_COLOURS):
            if before == "in" and shapes and shapes[-1].colour is None:
                shapes[-1] = ShapeClaim(shapes[-1].kind, word, shapes[-1].size)
            elif before == "something":
                shapes[-1] = ShapeClaim(None, word, shapes[-1].size)
            else:
                colour = word
        elif word in _SIZE_OF:
            size = _SIZE_OF[word]
        elif word in _PATTERN_OF:
            pattern = _PATTERN_OF[word]
        elif word in _KIND_OF or (word in _VAGUE and before not in ("one", "two", "three")):
            shapes.append(ShapeClaim(_KIND_OF.get(word), colour, size))
            colour = size = None
        elif word in _GROUNDS:
            background, on = colour or background, pattern or on
            colour = pattern = None
    return Claim(tuple(shapes), background, on)
