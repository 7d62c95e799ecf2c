"""Captions become WordPiece ids, and ids become masked ids with labels."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import os

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from vlmo_ray.data.schema import TEXT_NORMALIZER, problem_of_text
from vlmo_ray.errors import RecordError, UserError

PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = 0, 100, 101, 102, 103
FIRST_WORD_ID = 999  # "!"; the ids between MASK_ID and this one are unused
IGNORED_LABEL = -100


def vocabulary() -> list[str]:
    """The entries of bert-base-uncased, in the order of their ids. Packed, as every job uploads the package."""
    packed = importlib.resources.files("vlmo_ray.data") / "vocab" / "bert_base_uncased.txt.gz"
    return gzip.decompress(packed.read_bytes()).decode().splitlines()


@functools.cache
def _entries() -> list[str]:
    return vocabulary()


def words_of(ids: np.ndarray) -> list[tuple[str, list[int]]]:
    """The words of token ids `[T]`, in lower case, each with the places of its tokens; without special tokens."""
    found: list[tuple[str, list[int]]] = []
    for place, token in enumerate(ids.tolist()):
        if token in (PAD_ID, CLS_ID, SEP_ID):
            continue
        piece = _entries()[token]
        if piece.startswith("##") and found:
            word, places = found[-1]
            found[-1] = (word + piece[2:], [*places, place])
        else:
            found.append((piece, [place]))
    return found


def written(ids: np.ndarray) -> str:
    """Token ids `[T]` as a text, its words and marks apart."""
    return " ".join(word for word, _ in words_of(ids))


class Tokenizer:
    """The lower-casing WordPiece tokenizer of BERT base, cut or padded to `max_len`.

    A caption is plain text: "[MASK]" in one is split like any other characters, so that data from the web cannot place
    special tokens.
    """

    def __init__(self, max_len: int):
        if max_len < 3:
            raise UserError(f"max_text_len = {max_len} leaves no room between [CLS] and [SEP]; use at least 3")
        # Texts are encoded one at a time here; a thread pool would only make later forks unsafe.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        ids = {entry: index for index, entry in enumerate(vocabulary())}
        self.max_len = max_len
        self._words = RustTokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._words.normalizer = TEXT_NORMALIZER
        self._words.pre_tokenizer = BertPreTokenizer()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(ids, mask, word)`, each `[max_len]`: int32, bool, int16.

        `mask` is True at tokens, including [CLS] and [SEP]. `word` is the index of the whole word that a token is a
        piece of, and -1 at [CLS], [SEP] and padding. A longer text loses its end. Raises RecordError if the text is not
        valid or has no visible character.

            >>> Tokenizer(6).encode("Two dalmatians")
            [101, 2048, 17488, 18900, 7066, 102]  [True, ...]  [-1, 0, 1, 1, 1, -1]
        """
        if problem := problem_of_text(text, "text"):
            raise RecordError(problem)
        encoding = self._words.encode(text, add_special_tokens=False)
        pieces = encoding.ids[: self.max_len - 2]
        assert pieces, "`problem_of_text` has refused a text without a visible character"
        end = len(pieces) + 1
        ids = np.full(self.max_len, PAD_ID, np.int32)
        ids[0], ids[1:end], ids[end] = CLS_ID, pieces, SEP_ID
        word = np.full(self.max_len, -1, np.int16)
        word[1:end] = np.array(encoding.word_ids[: len(pieces)], np.int16)  # no None: there are no special tokens
        return ids, np.arange(self.max_len) <= end, word

    def words_alone(self) -> RustTokenizer:
        """A tokenizer of the words alone, without [CLS] and [SEP], for other programs."""
        return RustTokenizer.from_str(self._words.to_str())

    def words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Of each word: the number of tokens up to its end, and where in `text` it begins and ends.

        >>> Tokenizer(6).words("Two dalmatians")
        [1, 4]  [(0, 3), (4, 14)]
        """
        encoding = self._words.encode(text, add_special_tokens=False)
        ends: list[int] = []
        spans: list[tuple[int, int]] = []
        before = None
        for number, (word, (begin, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True), 1):
            if word == before:
                ends[-1], spans[-1] = number, (spans[-1][0], end)
            else:
                ends.append(number)
                spans.append((begin, end))
            before = word
        return ends, spans


def normalise(text: str) -> str:
    """The form in which two captions are compared: lower case, runs of white space as one space, no space or
    punctuation mark (. , ; : ! ?) at the end. A text of nothing but such marks keeps them.

        >>> normalise("A  dog runs. ") == normalise("a dog runs")
        True
    """
    text = " ".join(text.lower().split())
    return text.rstrip(" .,;:!?") or text


def mask_whole_words(
    ids: np.ndarray, word: np.ndarray, vocab_size: int, probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`(masked_ids, labels)`, int32 `[T]` each, for masked language modelling (paper section 3.3).

    Whole words are taken in random order until about `probability` x (number of real tokens) tokens are targets: the
    first word whatever its length, so that every text has a target, then each that still fits in the budget. Each
    target becomes [MASK] (80 %), a random vocabulary entry (10 %) or stays (10 %). `labels` has the true id at targets
    and -100 elsewhere. `ids` and `word` are as `Tokenizer.encode` returns them.

    Draws `[T, 3]` numbers at once: order of word t, fate of token t, replacement of token t.
    """
    assert vocab_size > FIRST_WORD_ID, f"vocab_size = {vocab_size} has no ordinary entry"
    order, fate, replacement = generator.random((len(ids), 3)).T
    lengths = np.bincount(word[word >= 0])
    assert len(lengths), "a text without a word cannot be masked"
    budget = max(1, round(probability * int(lengths.sum())))
    chosen = np.zeros(len(lengths), bool)
    taken = 0
    for candidate in np.argsort(order[: len(lengths)], kind="stable"):
        if taken == 0 or taken + lengths[candidate] <= budget:
            chosen[candidate] = True
            taken += lengths[candidate]
        if taken >= budget:
            break
    return _masked(ids, (word >= 0) & chosen[word], fate, replacement, vocab_size)


def mask_tokens(
    ids: np.ndarray, mask: np.ndarray, vocab_size: int, probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`(masked_ids, labels)` as `mask_whole_words`, of any tokens but [CLS], also [SEP]: for learning to write, as in
    BEiT-3. round(`probability` x number of tokens), at least one and at most all others, are targets.

    Draws `[3, T]` numbers at once: order, fate and replacement of token t.
    """
    length = int(mask.sum())
    count = min(max(1, round(probability * length)), length - 1)
    order, fate, replacement = generator.random((3, len(ids)))
    target = np.zeros(len(ids), bool)
    target[1 + np.argsort(order[1:length], kind="stable")[:count]] = True
    return _masked(ids, target, fate, replacement, vocab_size)


def _masked(
    ids: np.ndarray, target: np.ndarray, fate: np.ndarray, replacement: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.where(target, ids, IGNORED_LABEL).astype(np.int32)
    random_ids = FIRST_WORD_ID + (replacement * (vocab_size - FIRST_WORD_ID)).astype(np.int32)
    replaced = np.where(fate < 0.8, MASK_ID, np.where(fate < 0.9, random_ids, ids))
    return np.where(target, replaced, ids).astype(np.int32), labels
