"""BLEU, ROUGE-L and CIDEr-D of captions, equal to salaniz/pycocoevalcap but without its Java.

The scores are of a whole set: one candidate and several references for each image, in the same order. METEOR and
SPICE are missing: METEOR needs Java and a table of paraphrases, SPICE Java and a parser.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from vlmo_ray.errors import UserError

# Curly quotes, the en and em dash, the ellipsis.
_ASCII = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "--", "\u2014": "--", "\u2026": "..."}
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset("\"'`.?!,:;-")

_TOKEN = re.compile(
    r"""
    (?:[a-z]\.){2,}(?!\w) | [a-z]\.(?![\w.])                          # u.s.  a.m.  plan b.
  | (?:mrs?|ms|dr|prof|rev|sen|gov|gen|col|capt|lt|sgt|st|mt|ft|ave|blvd|rd|jr|sr|co|corp|inc|ltd|etc|vs
      |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri)\.(?!\w)
  | (?:no|ca|fig)\.(?=\s*\d)                                          # "no. 5"; elsewhere "no" and a period
  | '(?:s|m|d|re|ve|ll|em|til|cause|\d\ds?)\b | 'n\b'? | n't\b | y'(?=all\b) | ol'(?!\w)
  | [a-z]+?(?=n't\b)                                                  # is + n't
  | 't(?=(?:is|was)\b) | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
  | \d+:\d+(?=[ap]m\b)                                                # 10:30 + pm
  | (?>[+-]?\.?\d+(?:[.,:/-]\d+)*)(?!-?\w)                            # 3.5  1,000  1/2  -5
  | (?:(?:[cdlo]|qu|ma)'(?=[^\W_]{2}))?                               # o'clock  ma'am
    [^\W_]+(?:(?:[-./_]|(?<=\d),(?=\d))(?:(?!n't\b)[^\W_])+)*         # red-white  his/her  12-year-old
  | [?!]{2,} | \*{2,}
  | \S
    """,
    re.VERBOSE,
)


def tokens(text: str) -> list[str]:
    """The words of a caption as the COCO scorers count them: lower case, Penn Treebank style, without punctuation.

    `The man's dog (red-white) isn't here.` gives `the man 's dog -lrb- red-white -rrb- is n't here`. Brackets stay,
    because pycocoevalcap drops only their names in capitals and the text is in lower case by then.

    The standard is PTBTokenizer of Stanford CoreNLP 3.4.1 with `-preserveLines -lowerCase`. This function agrees
    with it on all 35,000 captions of Flickr8k (`benchmarks/caption_scores.py`). It differs in URLs,
    addresses, tags, HTML entities, smileys, currencies but the dollar, rare abbreviations, rare words with an
    apostrophe inside (`hallowe'en`), rare numbers (`1/1,000`, `.45-caliber`), and where Java looks at capitals: it
    keeps `AT&T` as one token, and splits off the period of `letter a. The`.
    """
    found = (match.group() for match in _TOKEN.finditer(text.translate(_ASCII).lower()))
    return [_BRACKETS.get(word, word) for word in found if word not in _DROPPED]


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All scores of one candidate and several references an image: `cider`, `rouge_l`, `bleu_4` to `bleu_1`.

    BLEU and ROUGE-L are in [0, 1], CIDEr in [0, 10]; papers give all of them times 100. Raises `UserError` as the
    single scores do.
    """
    words = [tokens(text) for text in candidates]
    own = [[tokens(text) for text in texts] for texts in references]
    scores = {"cider": cider_d(words, own), "rouge_l": rouge_l(words, own)}
    return scores | {f"bleu_{n}": value for n, value in reversed([*enumerate(bleu(words, own), 1)])}


def bleu(candidates: list[list[str]], references: list[list[list[str]]], n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-n of the corpus (Papineni et al. 2002): `[n]` values in [0, 1].

    An n-gram counts at most as often as in the reference that has most of it. The length to reach is that of the
    closest reference, the shorter of two. The terms 1e-15 and 1e-9 are pycocoevalcap's. Raises `UserError` for
    unequal numbers of images, for none, and for an image without a reference.
    """
    correct, guessed = [0] * n, [0] * n
    length = wanted = 0
    for candidate, captions in _images(candidates, references):
        most: Counter[tuple[str, ...]] = Counter()
        for caption in captions:
            most |= _ngrams(caption, n)
        for ngram, count in _ngrams(candidate, n).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
            guessed[len(ngram) - 1] += count
        length += len(candidate)
        wanted += min((len(caption) for caption in captions), key=lambda size: (abs(size - len(candidate)), size))
    precisions = [(c + 1e-15) / (g + 1e-9) for c, g in zip(correct, guessed, strict=True)]
    brevity = math.exp(min(0.0, 1 - (wanted + 1e-9) / (length + 1e-15)))
    return [brevity * math.prod(precisions[:k]) ** (1 / k) for k in range(1, n + 1)]


def rouge_l(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """ROUGE-L (Lin 2004) with beta 1.2, the mean over the images, in [0, 1].

    Precision and recall of the longest common subsequence take their maxima over the references separately. An
    empty caption counts as one empty word, as it does in pycocoevalcap. Raises `UserError` as `bleu` does.
    """
    total = 0.0
    for candidate, captions in _images(candidates, references):
        common = [(_common(candidate or [""], caption or [""]), max(1, len(caption))) for caption in captions]
        precision = max(shared for shared, _ in common) / max(1, len(candidate))
        recall = max(shared / size for shared, size in common)
        if precision:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(candidates)


def cider_d(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), the mean over the images, in [0, 10]. Raises `UserError` as `bleu` does.

    N-grams weigh log(images / images with it in a reference), so a score holds only for its set of images: that of
    one image alone is 0. The penalty on the difference of lengths has sigma 6.
    """
    images = _images(candidates, references)
    num_images_with: Counter[tuple[str, ...]] = Counter()
    for _, captions in images:
        num_images_with.update({ngram for caption in captions for ngram in _ngrams(caption, 4)})

    def weighted(words: list[str]) -> tuple[dict[tuple[str, ...], float], list[float]]:
        """The weight of every n-gram, and the norm for each n."""
        weights = {
            ngram: count * (math.log(len(images)) - math.log(max(1, num_images_with[ngram])))
            for ngram, count in _ngrams(words, 4).items()
        }
        squares = [0.0] * 4
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]

    total = 0.0
    for candidate, captions in images:
        own, own_norms = weighted(candidate)
        for caption in captions:
            other, other_norms = weighted(caption)
            products = [0.0] * 4
            for ngram in own:
                if ngram in other:
                    products[len(ngram) - 1] += min(own[ngram], other[ngram]) * other[ngram]
            cosines = (p / (a * b) for p, a, b in zip(products, own_norms, other_norms, strict=True) if p)
            longer = len(candidate) - len(caption)
            total += sum(cosines) / 4 * math.exp(-(longer**2) / (2 * 6.0**2)) / len(captions)
    return 10 * total / len(images)


def _images(candidates: list[list[str]], references: list[list[list[str]]]) -> list[tuple[list[str], list[list[str]]]]:
    if len(candidates) != len(references) or not candidates:
        counts = f"{len(candidates)} candidates, references of {len(references)} images"
        raise UserError(f"{counts}: give one candidate and its references for each of at least one image")
    for i, captions in enumerate(references):
        if not captions:
            raise UserError(f"image {i} has no reference caption to compare with; leave the image out or add one")
    return list(zip(candidates, references, strict=True))


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to n words occurs."""
    return Counter(tuple(words[i : i + k]) for k in range(1, n + 1) for i in range(len(words) - k + 1))


def _common(one: list[str], two: list[str]) -> int:
    """The length of the longest common subsequence, by the usual table, row by row."""
    row = [0] * (len(two) + 1)
    for word in one:
        diagonal = 0
        for j, other in enumerate(two, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
