"""VQA v2: how answers are compared, and what an answer of the list is worth for a question.

The rules are those of the official evaluation (GT-Vision-Lab/VQA, `vqaEval.py`), quirks included, since published
numbers have them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe, the colon and the period
_NUMBERS = {
    name: str(n)
    for n, name in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
_NUMBERS |= {"none": "0"}
_ARTICLES = ("a", "an", "the")
# Each is also accepted with any one of its apostrophes left out. "I'm", "I've" and "I'd've" are missing because the
# official table has them with a capital, which never occurs after lower-casing.
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
_SPELLED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def stripped(answer: str) -> str:
    """The answer without white space at its ends; line breaks and tabs become spaces."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)
def normalised(answer: str) -> str:
    """The form in which answers are compared: marks, articles, number words and contractions in one spelling.

    A mark is deleted if it stands next to a space anywhere in the answer, or if the answer has a comma between two
    digits; otherwise it becomes a space. At most 32 periods go, those before a digit stay.

        >>> normalised("New York, NY"), normalised("red/white"), normalised("1,000"), normalised("The man's dog")
        ('new york ny', 'red white', '1000', "man's dog")
    """
    text = answer = stripped(answer)
    has_number = re.search(r"\d,\d", answer) is not None
    for mark in _MARKS:
        loose = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if loose or has_number else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def label(answer: str) -> str:
    """The form in which an answer enters the list of answers: as `normalised`, without commas."""
    return normalised(answer).replace(",", "")


def soft_score(count: int) -> float:
    """The training target of an answer that `count` of the ten people gave."""
    return min(1.0, 0.3 * count)


def accuracy(matches: int, people: int = 10) -> float:
    """The official accuracy of an answer that equals those of `matches` of the people.

    It is the mean over the people of min(1, n / 3), where n counts the equal answers of the others.
    """
    own, other = (min(1.0, max(0, n) / 3) for n in (matches - 1, matches))
    return (matches * own + (people - matches) * other) / people


class AnswerList:
    """The answers that a model chooses from, K of them."""

    def __init__(self, answers: Sequence[str]):
        self.answers = tuple(answers)
        self._index = {answer: i for i, answer in enumerate(self.answers)}
        self._normalised: dict[str, list[int]] = {}
        for i, answer in enumerate(self.answers):
            self._normalised.setdefault(normalised(answer), []).append(i)

    def targets(self, scored: Sequence[dict]) -> np.ndarray:
        """Float32 `[K]`: the scores of a stored `answers` column, 0 for every other answer."""
        out = np.zeros(len(self.answers), np.float32)
        for entry in scored:
            out[self._index[entry["answer"]]] = entry["score"]
        return out

    def accuracies(self, given: Sequence[str]) -> np.ndarray:
        """Float32 `[K]`: the official accuracy of each answer for a question to which people gave the answers `given`.

        If all of them are equal, they are compared as they stand, otherwise normalised.
        """
        out = np.zeros(len(self.answers), np.float32)
        given = [stripped(answer) for answer in given]
        if len(set(given)) == 1:
            if given[0] in self._index:
                out[self._index[given[0]]] = accuracy(len(given), len(given))
            return out
        for answer, count in Counter(map(normalised, given)).items():
            out[self._normalised.get(answer, [])] = accuracy(count, len(given))
        return out


def answer_list(answers: Sequence[str], at_least: int = 9) -> tuple[str, ...]:
    """The answers that occur `at_least` times, in the order of their first occurrence, as `label` writes them."""
    counts = Counter(map(label, answers))
    return tuple(answer for answer, count in counts.items() if count >= at_least)
