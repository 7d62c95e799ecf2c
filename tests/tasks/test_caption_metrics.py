"""Caption scores: golden figures of pycocoevalcap on Flickr8k, its tokens, slow oracles on random corpora, edges."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from vlmo_ray.errors import UserError
from vlmo_ray.tasks.metrics.captions import bleu, caption_scores, cider_d, rouge_l, tokens

FLICKR = Path(__file__).parents[2].resolve().parent / "shared" / "data" / "flickr8k" / "dataset_flickr8k.json"


@pytest.mark.skipif(not FLICKR.is_file(), reason="the captions of Flickr8k are not here")
def test_pycocoevalcap_on_flickr8k():
    """Its figures for the first caption of each of the 1,000 val images against the other four, with Java's tokens."""
    entries = [entry for entry in json.loads(FLICKR.read_text())["images"] if entry["split"] == "val"]
    first, *others = zip(*([sentence["raw"] for sentence in entry["sentences"]] for entry in entries), strict=True)
    found = caption_scores(first, list(zip(*others, strict=True)))
    assert list(found) == ["cider", "rouge_l", "bleu_4", "bleu_3", "bleu_2", "bleu_1"]
    assert list(found.values()) == pytest.approx([0.80366, 0.49173, 0.21160, 0.30708, 0.44343, 0.62751], abs=6e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The man's dog isn't here; it can't, cannot, won't.", "the man 's dog is n't here it ca n't can not wo n't"),
        ("gonna gotta wanna gimme lemme 'tis tis", "gon na got ta wan na gim me lem me 't is tis"),
        ("U.S. e.g. a.m. ft. plan b. is no. 5, no. dog.", "u.s. e.g. a.m. ft. plan b. is no. 5 no dog"),
        ("3.5 1/2 10:30 50 % 50% 1,000 $5 #1 -5", "3.5 1/2 10:30 50 % 50 % 1,000 $ 5 # 1 -5"),
        ("red-white his/her 12-year-old a 4-wheeler", "red-white his/her 12-year-old a 4-wheeler"),
        ("a 1/2-inch and a 15,000-pound", "a 1/2-inch and a 15,000-pound"),
        ("at 10:30pm, 5pm, the 1950's and '90s", "at 10:30 pm 5pm the 1950 's and '90s"),
        ("(brackets) [square] {curly}", "-lrb- brackets -rrb- -lsb- square -rsb- -lcb- curly -rcb-"),
        ("\"quoted\" 'quoted' `x' \u201ccurly\u201d man\u2019s", "quoted quoted x curly man 's"),
        ("hello...there a--b a - b a\u2014b what?! wow!! no? :", "hello there a b a b a b what ?! wow !! no"),
        (
            "o'clock ma'am I'm rock 'n' roll y'all players' kids'",
            "o'clock ma'am i 'm rock 'n' roll y' all players kids",
        ),
        ("caf\u00e9 a&b a*b a=b w/ a_b", "caf\u00e9 a & b a * b a = b w / a_b"),
        (" . ", ""),
    ],
)
def test_tokens_are_those_of_java(text, words):
    assert tokens(text) == words.split()


def slow_bleu(candidates, references):
    def runs(words, n):
        return [" ".join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]

    logs, result = [], []
    closest = 0
    for words, captions in zip(candidates, references, strict=True):
        off = min(abs(len(caption) - len(words)) for caption in captions)
        closest += min(len(caption) for caption in captions if abs(len(caption) - len(words)) == off)
    ratio = (sum(map(len, candidates)) + 1e-15) / (closest + 1e-9)
    for n in (1, 2, 3, 4):
        right = total = 0
        for words, captions in zip(candidates, references, strict=True):
            left = [runs(caption, n) for caption in captions]
            for run in runs(words, n):  # a run that matches is struck out of every reference
                total += 1
                right += any(run in caption for caption in left)
                for caption in left:
                    if run in caption:
                        caption.remove(run)
        logs.append(math.log((right + 1e-15) / (total + 1e-9)))
        result.append(math.exp(np.mean(logs)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return result


def slow_rouge(candidates, references):
    def longest(one, two):
        """Tries every subsequence of both."""
        every = [{s for k in range(len(w) + 1) for s in itertools.combinations(w, k)} for w in (one, two)]
        return max(map(len, every[0] & every[1]))

    scores = []
    for words, captions in zip(candidates, references, strict=True):
        words, captions = words or [""], [caption or [""] for caption in captions]
        p = max(longest(words, caption) / len(words) for caption in captions)
        r = max(longest(words, caption) / len(caption) for caption in captions)
        scores.append(2.44 / (1 / p + 1.44 / r) if p else 0)
    return np.mean(scores)


def slow_cider(candidates, references):
    """Dense tf-idf vectors over all n-grams of the corpus."""
    scores = np.zeros((len(candidates), 4))
    for n in (1, 2, 3, 4):

        def runs(words, n=n):
            return list(zip(*(words[i:] for i in range(n)), strict=False))

        corpus = [caption for captions in references for caption in captions] + candidates
        vocabulary = sorted({run for words in corpus for run in runs(words)})
        found_in = [sum(any(v in runs(c) for c in captions) for captions in references) for v in vocabulary]
        idf = np.log(len(candidates)) - np.log(np.maximum(found_in, 1))
        for i, (words, captions) in enumerate(zip(candidates, references, strict=True)):
            for caption in captions:
                h, r = (np.array([runs(w).count(v) for v in vocabulary]) * idf for w in (words, caption))
                bigrams = [sum(1 for _ in itertools.pairwise(w)) for w in (words, caption)]
                gauss = np.exp(-((bigrams[0] - bigrams[1]) ** 2) / 72)
                scale = np.linalg.norm(h) * np.linalg.norm(r)
                scores[i, n - 1] += gauss * (np.minimum(h, r) @ r) / (scale or 1) / len(captions)
    return 10 * scores.mean()


@pytest.mark.parametrize("seed", range(40))
def test_scores_are_those_of_slow_oracles(seed):
    """2 to 5 images, 1 to 4 references each, of 0 to 8 words out of 3 to 6: n-grams recur within a caption."""
    draw = np.random.default_rng(seed)
    words = "abcdef"[: draw.integers(3, 7)]

    def caption() -> list[str]:
        return [str(word) for word in draw.choice(list(words), draw.integers(0, 9))]

    candidates = [caption() for _ in range(draw.integers(2, 6))]
    references = [[caption() for _ in range(draw.integers(1, 5))] for _ in candidates]
    assert bleu(candidates, references) == pytest.approx(slow_bleu(candidates, references), rel=1e-9)
    assert bleu(candidates, references, n=2) == bleu(candidates, references)[:2]
    assert rouge_l(candidates, references) == pytest.approx(slow_rouge(candidates, references), rel=1e-9)
    assert cider_d(candidates, references) == pytest.approx(slow_cider(candidates, references), rel=1e-9, abs=1e-12)


def test_an_exact_candidate_scores_the_most_and_an_empty_one_nothing():
    captions = ["A dog runs on grass.", "Two men sit at the table", "one red kite flies high above trees"]
    best = caption_scores(captions, [[caption.upper()] for caption in captions])
    assert list(best.values()) == pytest.approx([10, 1, 1, 1, 1, 1])
    assert set(caption_scores(["", ".", " "], [[caption] for caption in captions]).values()) == {0.0}


def test_cider_of_one_image_is_zero():
    found = caption_scores(["a dog runs on grass"], [["a dog runs on grass", "a cat"]])
    assert found["cider"] == 0 and found["bleu_4"] == pytest.approx(1) == found["rouge_l"]


def test_refusals():
    for scores in (bleu, rouge_l, cider_d):
        with pytest.raises(UserError, match="2 candidates, references of 1 images"):
            scores([["a"], ["b"]], [[["a"]]])
        with pytest.raises(UserError, match="at least one image"):
            scores([], [])
        with pytest.raises(UserError, match="image 1 has no reference"):
            scores([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(UserError, match="image 0 has no reference"):
        caption_scores(["a"], [[]])
