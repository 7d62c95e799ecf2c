"""Captions: ids against tokenizers' own BERT class, whole words against '##', refusals, and masking."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer

from vlmo_ray.data import text as module
from vlmo_ray.data.text import MASK_ID, PAD_ID, Tokenizer, mask_whole_words, normalise
from vlmo_ray.errors import RecordError, UserError

WORDS = module.vocabulary()
VOCAB_SIZE = len(WORDS)
TOKENIZER = Tokenizer(max_len=24)
ORACLE = BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)}, lowercase=True)
checked = settings(derandomize=True, max_examples=200, deadline=None, database=None)


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["Dalmatians", "café,", "東京", "don't", "🐶", "ÅBC", "3.14", "#x", "##y", "x" * 101]


def real(ids):
    return ids[ids != PAD_ID].tolist()


# ---- ids -------------------------------------------------------------------------------------------------


def test_known_ids():
    ids, mask, word = TOKENIZER.encode("a dog")
    assert real(ids) == [101, 1037, 3899, 102]
    assert ids.shape == mask.shape == word.shape == (24,)
    assert (ids.dtype, mask.dtype, word.dtype) == (np.int32, np.bool_, np.int16)
    assert mask.tolist() == [True] * 4 + [False] * 20
    assert word.tolist() == [-1, 0, 1] + [-1] * 21


def test_pieces_share_the_word_of_their_head():
    ids, mask, word = Tokenizer(6).encode("Two dalmatians")
    assert ids.tolist() == [101, 2048, 17488, 18900, 7066, 102]
    assert word.tolist() == [-1, 0, 1, 1, 1, -1] and mask.all()


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES)).map(" ".join)))
@checked
def test_ids_are_those_of_tokenizers(caption):
    assume(not any(special in caption for special in SPECIALS))
    want = ORACLE.encode(caption).ids
    if len(want) == 2:
        with pytest.raises(RecordError):
            TOKENIZER.encode(caption)
        return
    ids, mask, word = TOKENIZER.encode(caption)
    assert ids[mask].tolist() == ([*want[:-1][:23], 102])
    count = -1
    for token, index in zip(ids[mask][1:-1], word[mask][1:-1], strict=True):
        count += not WORDS[token].startswith("##")
        assert index == count
    assert (word[~mask] == -1).all() and word[0] == word[mask.sum() - 1] == -1 and (ids[~mask] == PAD_ID).all()


def test_a_long_text_loses_its_end_and_keeps_sep():
    ids, mask, _ = TOKENIZER.encode("dog " * 100)
    assert ids.tolist() == [101, *[3899] * 22, 102] and mask.all()


def test_special_tokens_cannot_be_written():
    ids, _, _ = TOKENIZER.encode("[MASK] [SEP]")
    assert not set(ids[1:-1]) & {MASK_ID} and real(ids).count(102) == 1
    assert real(ids)[:4] == [101, WORDS.index("["), WORDS.index("mask"), WORDS.index("]")]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "there is no text"),
        (b"cafe", "not a string"),
        ("", "there is no text"),
        (" \n\t\u3000", "there is no text"),
        ("\u200b\x00", "there is no text"),
        ("a \ud83d dog", "not valid Unicode"),
    ],
)
def test_what_is_no_text_is_named(caption, reason):
    with pytest.raises(RecordError, match=reason):
        TOKENIZER.encode(caption)


def test_the_vocabulary_has_the_special_tokens_at_their_ids():
    ids = (module.PAD_ID, module.UNK_ID, module.CLS_ID, module.SEP_ID, module.MASK_ID, module.FIRST_WORD_ID)
    assert [WORDS[i] for i in ids] == [*SPECIALS, "!"]


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match="max_text_len = 2"):
        Tokenizer(2)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A  dog runs. ", "a dog runs", True),
        ("a dog\nruns !!", "A DOG RUNS", True),
        ("a dog runs", "a dogruns", False),
        ("a dog's bowl", "a dogs bowl", False),
        ("...", "!", False),
    ],
)
def test_normalise(one, other, same):
    assert (normalise(one) == normalise(other)) is same
    assert normalise(normalise(one)) == normalise(one)


# ---- masking ---------------------------------------------------------------------------------------------


@st.composite
def captions(draw):
    """Ids and words as `encode` gives them, from random word lengths."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    word = np.repeat(np.arange(len(lengths)), lengths).astype(np.int16)
    tokens = np.array(draw(st.lists(st.integers(999, VOCAB_SIZE - 1), min_size=len(word), max_size=len(word))))
    pad = draw(st.integers(0, 5))
    ids = np.concatenate([[101], tokens, [102], np.zeros(pad)]).astype(np.int32)
    return ids, np.pad(word, (1, 1 + pad), constant_values=-1)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


@given(captions(), st.floats(0.01, 0.9), st.integers(0, 2**32))
@checked
def test_masking_takes_whole_real_words_within_the_budget(caption, probability, seed):
    ids, word = caption
    before = ids.copy()
    masked, labels = mask_whole_words(ids, word, VOCAB_SIZE, probability, generator(seed))
    np.testing.assert_array_equal(ids, before)
    assert masked.shape == labels.shape == ids.shape and masked.dtype == labels.dtype == np.int32
    target = labels != -100
    assert (word[target] >= 0).all()
    np.testing.assert_array_equal(labels[target], ids[target])
    np.testing.assert_array_equal(masked[~target], ids[~target])
    targets = {int(w) for w in word[target]}
    assert targets
    assert all(target[word == w].all() for w in targets)
    budget = max(1, round(probability * (word >= 0).sum()))
    assert target.sum() <= budget or len(targets) == 1
    spare = budget - target.sum()  # nothing that still fitted was left out
    assert spare <= 0 or all((word == w).sum() > spare for w in set(word[word >= 0].tolist()) - targets)
    replaced = masked[target & (masked != ids)]
    assert ((replaced == MASK_ID) | (replaced >= 999)).all() and (replaced < VOCAB_SIZE).all()


def test_masking_is_a_function_of_the_draws_of_a_token():
    """Also for a longer padding: token t uses draws t, however many follow."""
    ids, _, word = Tokenizer(10).encode("two dalmatians on a mat")
    long_ids, _, long_word = Tokenizer(17).encode("two dalmatians on a mat")
    for seed in range(20):
        masked, labels = mask_whole_words(ids, word, VOCAB_SIZE, 0.3, generator(seed))
        again = mask_whole_words(long_ids, long_word, VOCAB_SIZE, 0.3, generator(seed))
        np.testing.assert_array_equal(again[0][:10], masked)
        np.testing.assert_array_equal(again[1][:10], labels)


def test_masking_statistics():
    """15 % of tokens, every word equally often, and 80 / 10 / 10."""
    ids = np.array([101, *range(2000, 2020), 102], np.int32)
    word = np.array([-1, *range(20), -1], np.int16)
    runs = [mask_whole_words(ids, word, VOCAB_SIZE, 0.15, generator(seed)) for seed in range(6000)]
    masked, labels = (np.stack(part) for part in zip(*runs, strict=True))
    target = labels != -100
    assert (target.sum(1) == 3).all()
    per_word = target.sum(0)[1:-1]
    assert abs(per_word - 900).max() < 4 * 900**0.5
    n = target.sum()
    fates = masked[target]
    is_mask, is_kept = fates == MASK_ID, fates == labels[target]
    for share, seen in ((0.8, is_mask), (0.1, is_kept), (0.1, ~is_mask & ~is_kept)):
        assert abs(seen.sum() - share * n) < 4 * (n * share * (1 - share)) ** 0.5
    random_ids = fates[~is_mask & ~is_kept]
    assert random_ids.min() < 1200 and random_ids.max() > VOCAB_SIZE - 200  # spread over the vocabulary
    assert abs(random_ids.mean() - (999 + VOCAB_SIZE) / 2) < 4 * VOCAB_SIZE / 12**0.5 / len(random_ids) ** 0.5


def test_every_short_caption_has_a_target():
    for caption in ("dog", "dalmatians", "a dog", "🐶"):
        ids, _, word = TOKENIZER.encode(caption)
        for seed in range(20):
            assert (mask_whole_words(ids, word, VOCAB_SIZE, 0.15, generator(seed))[1] != -100).any()
