"""Texts about synthetic scenes: true, unambiguous, balanced, short, and kept true by what they forbid.

The oracle is a second reading of the language: small parsers, written against the English only, turn every
caption, question and statement back into a check on the scene graph.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from scenes.graphs import mirrored
from scenes.questions import _PAIR_TEXTS, ANSWERS, is_true_of_pair, pair_statement, pair_with_claim, questions
from scenes.records import vqa_records
from tokenizers import BertWordPieceTokenizer

from vlmo_ray.data.text import vocabulary
from vlmo_ray.demo.scenes.captions import MAX_TOKENS, captions, forbidden_augmentations, num_tokens
from vlmo_ray.demo.scenes.claims import is_true
from vlmo_ray.demo.scenes.records import mask_of, retrieval_records, retrieval_set
from vlmo_ray.demo.scenes.render import PATTERNS
from vlmo_ray.demo.scenes.world import BACKGROUND_COLOURS, HELD_OUT, KINDS, SHAPE_COLOURS, SIZES, scene

# ---- a second reading of the language -------------------------------------------------------------------

KIND_OF = {k: k for k in KINDS} | {"disc": "circle", "hoop": "ring", "plus": "cross"}
SIZE_OF = {"little": "small", "tiny": "small", "big": "large", "huge": "large"} | {s: s for s in SIZES}
PATTERN_OF = {p: p for p in PATTERNS} | {"dotted": "spotted"}
NUMBER_OF = {"one": 1, "two": 2, "three": 3}
ROW_OF = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
COL_OF = {"left": 0, "right": 2}
BETWEEN = r" (to the left of|to the right of|left of|right of|above|below|under) "


def matches(phrase: str, shape) -> bool:
    """Whether one noun phrase, with a place perhaps, is true of one shape."""
    words = set(re.findall(r"\w+", phrase))
    middle = words & {"middle", "center"}
    return (
        all(KIND_OF[w] == shape.kind for w in words & set(KIND_OF))
        and all(w == shape.colour for w in words & set(SHAPE_COLOURS))
        and all(SIZE_OF[w] == shape.size for w in words & set(SIZE_OF))
        and all(ROW_OF[w] == shape.row for w in words & set(ROW_OF))
        and all(COL_OF[w] == shape.col for w in words & set(COL_OF))
        and (not middle or (shape.row, shape.col) == (1, 1))
    )


def background_matches(phrase: str, shown) -> bool:
    words = set(phrase.split())
    return all(w == shown.background.colour for w in words & set(BACKGROUND_COLOURS)) and all(
        PATTERN_OF[w] == shown.background.pattern for w in words & set(PATTERN_OF)
    )


def relation_holds(words: str, a, b) -> bool:
    if "left" in words:
        return a.col < b.col
    if "right" in words:
        return a.col > b.col
    return a.row < b.row if words == "above" else a.row > b.row


def caption_is_true(text: str, shown) -> bool:
    text = re.sub(r"^an? (picture|image|drawing) of ", "", text)
    background = re.search(r"\ban? ([a-z]+ ){0,2}(background|backdrop)\b", text)
    if background:
        if not background_matches(background[0], shown):
            return False
        text = text.replace(background[0], "")
        text = re.sub(r",? (on|over|against) *(?=$|:)", "", text)  # "... on [background]"
        text = re.sub(r"^( with |on , )", "", text)  # "[background] with ...", "on [background], ..."
    number = re.match(r"(one|two|three) (shapes?|objects?) ?:? ?", text)
    if number:
        if NUMBER_OF[number[1]] != len(shown.shapes):
            return False
        text = text.replace(number[0], "")
    if related := re.split(BETWEEN, text)[1:]:
        first, second = re.split(BETWEEN, text)[0::2]
        return any(
            matches(first, a) and matches(second, b) and relation_holds(related[0], a, b)
            for a, b in itertools.permutations(shown.shapes, 2)
        )
    phrases = [p for p in re.split(r", | and ", text) if p]
    assert all(re.fullmatch(r"(an?|something) [a-z ]+", p) for p in phrases), text  # nothing left unread
    return any(all(map(matches, phrases, chosen)) for chosen in itertools.permutations(shown.shapes, len(phrases)))


def the(shapes, phrase: str):
    found = [s for s in shapes if matches(phrase, s)]
    assert len(found) == 1, f"{phrase} is ambiguous"
    return found[0]


def answer(question: str, shown) -> str:
    shapes, background = shown.shapes, shown.background
    q = question.removesuffix("?")
    if q == "how many shapes are there":
        return str(len(shapes))
    if q == "what color is the background":
        return background.colour
    if q == "what pattern is the background":
        return background.pattern
    if q == "what is the largest shape":
        return max(shapes, key=lambda s: s.radius).kind
    if m := re.match(r"what color is the (.*)", q):
        return the(shapes, m[1]).colour
    if m := re.match(r"how big is the (.*)", q):
        return "large" if the(shapes, m[1]).radius > 0.18 else "small"
    if m := re.match(r"(?:what|which) shape is (.*)", q):
        return the(shapes, m[1]).kind
    if m := re.match(r"is there (.*)", q):
        truth = any(matches(m[1], s) for s in shapes)
    elif m := re.match(r"is the background (.*)", q):
        truth = m[1] in (background.colour, background.pattern)
    elif m := re.match(rf"is the (\w+){BETWEEN}the (\w+)$", q):
        truth = relation_holds(m[2], the(shapes, m[1]), the(shapes, m[3]))
    else:
        m = re.fullmatch(r"is the (\w+) (small|large)", q)
        truth = the(shapes, m[1]).size == m[2]
    return "yes" if truth else "no"


def statement_is_true(text: str, left, right) -> bool:
    counts = len(left.shapes), len(right.shapes)
    if "fewer" in text:
        return counts[0] < counts[1]
    if "more shapes" in text:
        return counts[0] > counts[1]
    if "number" in text:
        return counts[0] == counts[1]
    if "background color" in text:
        return left.background.colour == right.background.colour
    phrase = re.search(r"\ban? (\w+ )?(shape|" + "|".join(KINDS) + r")\b", text)[0]
    holds = [any(matches(phrase, s) for s in shown.shapes) for shown in (left, right)]
    if "left image" in text or "right image" in text:
        return holds["right" in text]
    if "neither" in text or "no image" in text:
        return sum(holds) == 0
    return sum(holds) == (1 if "one" in text else 2)


def sample(n=120, seed=11):
    return [scene(seed, i, split) for split in ("train", "eval") for i in range(n)]


# ---- texts ----------------------------------------------------------------------------------------------


def test_captions_are_true_and_mean_their_claims():
    scenes = sample(150)
    others = scenes[::30]
    verdicts = Counter()
    for shown in scenes:
        told = captions(shown, 8)
        assert len({c.text for c in told}) == 8
        for c in told:
            assert is_true(c.claim, shown) and caption_is_true(c.text, shown), c.text
            for other in others:
                verdict = is_true(c.claim, other)
                assert verdict == caption_is_true(c.text, other), (c.text, other.shapes)
                verdicts[verdict] += 1
    assert verdicts[True] > 100  # so that both verdicts were compared


def test_captions_never_name_a_held_out_combination_in_training():
    texts = [c.text for i in range(400) for c in captions(scene(5, i), 4)]
    texts += [q for i in range(200) for q, _ in questions(scene(5, i))]
    texts += [pair_statement(5, i)[2] for i in range(300)]
    for colour, kind in HELD_OUT:
        assert not any(re.search(rf"{colour} {kind}|{kind} in {colour}", text) for text in texts)


def test_captions_are_varied_and_mostly_telling():
    told = [captions(scene(6, i))[0] for i in range(1500)]
    assert len({c.text for c in told}) > 1300
    telling = [bool(c.claim.background and any(p.colour and p.kind for p in c.claim.shapes)) for c in told]
    assert np.mean(telling) > 0.85
    complete = [
        bool(c.claim.background) and sum(bool(p.colour and p.kind) for p in c.claim.shapes) == len(scene(6, i).shapes)
        for i, c in enumerate(told)
    ]
    assert np.mean(complete) > 0.55
    assert {c.claim.relation for c in told} == {None, "left of", "right of", "above", "below"}


def test_every_word_is_one_token():
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary())}, lowercase=True)
    texts = [c.text for i in range(400) for c in captions(scene(7, i, ("train", "eval")[i % 2]), 4)]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert len(tokens.ids) == num_tokens(text) <= MAX_TOKENS == 20
        assert not any(token.startswith("##") or token == "[UNK]" for token in tokens.tokens)
    for a in ANSWERS:
        assert len(tokenizer.encode(a).ids) == 3, a
    for i in range(60):
        for q, _ in questions(scene(7, i)):
            assert not any(token.startswith("##") for token in tokenizer.encode(q).tokens), q
    for text in itertools.chain.from_iterable(_PAIR_TEXTS.values()):
        assert len(tokenizer.encode(text.format("a blue circle")).ids) <= 20


def test_questions():
    verdicts, forms = Counter(), Counter()
    for shown in sample():
        asked = questions(shown)
        assert len({q for q, _ in asked}) == len(asked)
        for q, a in asked:
            assert a in ANSWERS
            assert a == answer(q, shown), (q, a, shown.shapes)
            verdicts[a] += 1
            forms[" ".join(q.split()[:2])] += 1
    assert verdicts["yes"] == verdicts["no"]
    assert set(verdicts) == set(ANSWERS)
    assert set(forms) == {
        "how many",
        "what color",
        "what pattern",
        "how big",
        "what shape",
        "which shape",
        "what is",
        "is there",
        "is the",
    }


def test_pair_statements():
    truths: dict[str, list[bool]] = {}
    for i in range(1500):
        split = ("train", "eval")[i % 2]
        left, right, text, truth, claim = pair_with_claim(8, i, split, 32)
        assert truth == statement_is_true(text, left, right) == is_true_of_pair(claim, left, right), text
        truths.setdefault(claim.form, []).append(truth)
        assert split == "eval" or not (left.held_out or right.held_out)
    assert set(truths) == set(_PAIR_TEXTS)
    for form, values in truths.items():
        assert np.mean(values) == pytest.approx(0.5, abs=0.15), form
    first, second = pair_statement(8, 4, "eval"), pair_statement(8, 4, "eval")
    assert first == second and first[0] != first[1]
    np.testing.assert_array_equal(first[0].image, second[0].image)
    assert not np.array_equal(first[0].image, first[1].image)


# ---- augmentations --------------------------------------------------------------------------------------


def test_flip_is_forbidden_exactly_where_sides_are_named():
    became_untrue = 0
    for shown in sample():
        flipped = mirrored(shown)
        assert mirrored(flipped).shapes[0].col == shown.shapes[0].col
        for c in captions(shown, 6):
            forbid = forbidden_augmentations(c)
            side = c.claim.relation in ("left of", "right of") or any(p.col in (0, 2) for p in c.claim.shapes)
            assert ("flip" in forbid) == side, c.text
            if not side:
                assert is_true(c.claim, flipped) and caption_is_true(c.text, flipped), c.text
            became_untrue += not is_true(c.claim, flipped)
            assert ("crop" in forbid) == bool(c.claim.shapes or c.claim.count), c.text
            assert ("geometric" in forbid) == ("crop" in forbid or c.claim.pattern == "plain"), c.text
            colours = bool(c.claim.background) or any(p.colour for p in c.claim.shapes)
            assert ("color" in forbid) == colours, c.text
    assert became_untrue > 50


def test_flipping_pixels_is_flipping_the_graph():
    shown = scene(9, 1, image_size=64)
    wrong = mask_of(shown)[:, ::-1] != mask_of(mirrored(shown))
    assert wrong.mean() < 0.03  # centres are rounded to a pixel


@pytest.mark.parametrize(
    "text, forbidden",
    [
        ("a red circle on a black background", ("crop", "color", "geometric")),
        ("a ring on the left", ("crop", "flip", "geometric")),
        ("a disc at the top", ("crop", "geometric")),
        ("a striped background", ()),
        ("a plain background", ("geometric",)),
        ("a blue striped background", ("color",)),
        ("what color is the background?", ("color",)),
        ("is the star to the left of the ring?", ("crop", "flip", "geometric")),
        ("the left image has more shapes than the right image", ("crop", "geometric")),
        ("the images have the same background color", ("color",)),
    ],
)
def test_forbidden_augmentations(text, forbidden):
    assert forbidden_augmentations(text) == forbidden


# ---- texts in records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_retrieval_has_one_right_answer(seed):
    chosen = retrieval_set(seed)
    assert len(chosen) == 200 and retrieval_set(seed, 17) == chosen[:17]
    assert len({c.text for _, c in chosen}) == 200
    assert {shown.split for shown, _ in chosen} == {"eval"}
    assert np.mean([shown.held_out for shown, _ in chosen]) == pytest.approx(1 / 3, abs=0.12)
    for i, (_, c) in enumerate(chosen):
        assert [j for j, (other, _) in enumerate(chosen) if caption_is_true(c.text, other)] == [i]
    rows = list(retrieval_records(seed, 9, 32))
    assert [r["text"] for r in rows] == [c.text for _, c in chosen[:9]]
    assert [r["held_out"] for r in rows] == [s.held_out for s, _ in chosen[:9]]


def test_vqa_records():
    rows = list(vqa_records(1, 300, "eval", 16))
    assert len({r["id"] for r in rows}) == len(rows) == 1200
    for i, row in enumerate(rows):
        shown = scene(1, i // 4, "eval", 16)
        assert row["image_id"] == shown.name and row["answer"] == answer(row["text"], shown)
        assert "flip" not in row["forbid"] or "left" in row["text"] or "right" in row["text"]
    binary = Counter(r["answer"] for r in rows if r["answer"] in ("yes", "no"))
    assert binary["yes"] / binary.total() == pytest.approx(0.5, abs=0.08)
    assert rows[-4:] == list(vqa_records(1, 1, "eval", 16, start=299))
