"""Captions become WordPiece ids, and ids become masked ids with labels."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from vlmo_ray.errors import RecordError, UserError

PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = 0, 100, 101, 102, 103
FIRST_WORD_ID = 999  # "!"; the ids between MASK_ID and this one are reserved and appear in no text
IGNORED_LABEL = -100

_SPECIALS = {"[PAD]": PAD_ID, "[UNK]": UNK_ID, "[CLS]": CLS_ID, "[SEP]": SEP_ID, "[MASK]": MASK_ID}


class TextError(RecordError):
    """Why one record has no text that can be trained on."""


class Tokenizer:
    """The lower-casing WordPiece tokenizer of BERT base, cut or padded to `max_len`.

    A caption is plain text: "[MASK]" written in one is split like any other characters, so that data
    from the web cannot place special tokens. `vocab` is a vocabulary file in BERT's layout, one entry a
    line; by default the one that comes with the package.
    """

    def __init__(self, max_len: int, vocab: str | Path | None = None):
        if max_len < 3:
            raise UserError(f"max_text_len = {max_len} leaves no room between [CLS] and [SEP]; use at least 3")
        # Texts are encoded one at a time here; a thread pool would only make later forks unsafe.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        shipped = importlib.resources.files("vlmo_ray.data") / "vocab" / "bert_base_uncased.txt"
        lines = (Path(vocab) if vocab else shipped).read_text(encoding="utf-8").splitlines()
        ids = {entry: index for index, entry in enumerate(lines)}
        for entry, index in _SPECIALS.items():
            if ids.get(entry) != index:
                raise UserError(f"{vocab} is not in the layout of BERT's vocabulary: line {index} must be {entry}")
        self.max_len = max_len
        self.vocab_size = len(lines)
        self._words = RustTokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._words.normalizer = BertNormalizer(lowercase=True)
        self._words.pre_tokenizer = BertPreTokenizer()

    def encode(self, text: str | bytes | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(ids, mask, word)`, each `[max_len]`: int32, bool, int16.

        `mask` is True at tokens, [CLS] and [SEP] among them. `word` is the index of the whole word that
        a token is a piece of, and -1 at [CLS], [SEP] and padding. A longer text loses its end. Raises
        `TextError`.

            >>> Tokenizer(6).encode("Two dalmatians")
            [101, 2048, 17488, 18900, 7066, 102]  [True, ...]  [-1, 0, 1, 1, 1, -1]
        """
        encoding = self._words.encode(_checked(text), add_special_tokens=False)
        pieces = encoding.ids[: self.max_len - 2]
        if not pieces:
            raise TextError("text has no visible character")
        end = len(pieces) + 1
        ids = np.full(self.max_len, PAD_ID, np.int32)
        ids[0], ids[1:end], ids[end] = CLS_ID, pieces, SEP_ID
        word = np.full(self.max_len, -1, np.int16)
        word[1:end] = encoding.word_ids[: len(pieces)]
        return ids, np.arange(self.max_len) <= end, word


def _checked(text: str | bytes | None) -> str:
    if text is None:
        raise TextError("no text")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            raise TextError("text is not UTF-8") from None
    if not isinstance(text, str):
        raise TextError(f"text is of type {type(text).__name__}")
    if not text.strip():
        raise TextError("text is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):  # half a character; tokenizers cannot take it
        raise TextError("text is not valid Unicode")
    return text


def normalise(text: str) -> str:
    """The form in which two captions count as the same text: lower case, runs of white space as one space,
    no space or punctuation mark (. , ; : ! ?) at the end. A text of such marks only keeps them.

        >>> normalise("A  dog runs. ") == normalise("a dog runs")
        True
    """
    text = " ".join(text.lower().split())
    return text.rstrip(" .,;:!?") or text


def mask_whole_words(
    ids: np.ndarray, word: np.ndarray, vocab_size: int, probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`(masked_ids, labels)`, int32 `[T]` each, for masked language modelling (paper section 3.3).

    Whole words are taken in random order until about `probability` x (number of real tokens) tokens are
    targets: the first word whatever its length, so that every text has a target, then each that still fits
    in the budget. Each target becomes [MASK] (80 %), a random vocabulary entry (10 %) or stays (10 %).
    `labels` has the true id at targets and -100 elsewhere. `ids` and `word` are as `Tokenizer.encode` gives.

    `generator` is asked once for `[T, 3]` numbers: order of word t, fate of token t, replacement of token t.
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
    target = (word >= 0) & chosen[word]
    labels = np.where(target, ids, IGNORED_LABEL).astype(np.int32)
    random_ids = FIRST_WORD_ID + (replacement * (vocab_size - FIRST_WORD_ID)).astype(np.int32)
    replaced = np.where(fate < 0.8, MASK_ID, np.where(fate < 0.9, random_ids, ids))
    return np.where(target, replaced, ids).astype(np.int32), labels
