"""Retrieval recall: against a slow loop, ties, chunking, a subset of queries, chance levels, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo_ray.tasks.metrics import chance_recall, recall_at_k


def slow_recall(images, texts, image_of_text, ks):
    """The definition in exact integers: a wrong candidate that ties stands first."""
    images, texts = images.astype(int).tolist(), texts.astype(int).tolist()

    def similarity(i, t):
        return sum(a * b for a, b in zip(images[i], texts[t], strict=True))

    text_ranks, image_ranks = [], []
    for i in range(len(images)):
        own = [similarity(i, t) for t in range(len(texts)) if image_of_text[t] == i]
        if own:
            others = [similarity(i, t) for t in range(len(texts)) if image_of_text[t] != i]
            text_ranks.append(sum(s >= max(own) for s in others))
    for t, i in enumerate(image_of_text):
        image_ranks.append(sum(similarity(o, t) >= similarity(i, t) for o in range(len(images)) if o != i))
    result = {f"text_retrieval_r@{k}": np.mean([r < k for r in text_ranks]) for k in ks}
    return result | {f"image_retrieval_r@{k}": np.mean([r < k for r in image_ranks]) for k in ks}


@given(st.integers(1, 9), st.integers(1, 14), st.integers(1, 4), st.integers(1, 15), st.integers(0, 2**32))
@settings(derandomize=True, max_examples=100, deadline=None, database=None)
def test_recall_is_the_slow_loops(num_images, num_texts, width, chunk, seed):
    """Small whole numbers as features, so that ties abound; some images have no text."""
    draw = np.random.default_rng(seed)
    images = draw.integers(-2, 3, (num_images, width)).astype(np.float32)
    texts = draw.integers(-2, 3, (num_texts, width)).astype(np.float32)
    image_of_text = draw.integers(0, num_images, num_texts)
    ks = (1, 2, 5)
    assert recall_at_k(images, texts, image_of_text, ks, chunk) == slow_recall(images, texts, image_of_text, ks)


def test_asking_for_some_images_keeps_the_candidates():
    """Recall of the asked is the mean of recalls asked one by one, each against every candidate."""
    draw = np.random.default_rng(4)
    images = draw.integers(-2, 3, (7, 3)).astype(np.float32)
    texts = draw.integers(-2, 3, (11, 3)).astype(np.float32)
    image_of_text = np.concatenate([np.arange(6), draw.integers(0, 6, 5)])  # image 6 has none
    asked = np.array([True, False, True, True, False, False, True])
    found = recall_at_k(images, texts, image_of_text, (2,), asked=asked)
    alone = {i: recall_at_k(images, texts, image_of_text, (2,), asked=np.arange(7) == i) for i in (0, 2, 3)}
    texts_of = np.bincount(image_of_text)
    for name, weights in (("text_retrieval_r@2", [1, 1, 1]), ("image_retrieval_r@2", texts_of[[0, 2, 3]])):
        assert found[name] == pytest.approx(np.average([one[name] for one in alone.values()], weights=weights))
    everyone = recall_at_k(images, texts, image_of_text, (2,), asked=np.ones(7, bool))
    assert everyone == recall_at_k(images, texts, image_of_text, (2,)) != found
    with pytest.raises(ValueError, match="no image that is asked for"):
        recall_at_k(images, texts, image_of_text, (2,), asked=np.arange(7) == 6)


def unit(draw, *shape):
    x = draw.normal(size=shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_recall_of_real_features_is_that_of_a_full_sort():
    draw = np.random.default_rng(0)
    images = unit(draw, 37, 48)
    image_of_text = draw.permutation(np.repeat(np.arange(37), 3))
    texts = unit(draw, 111, 48) * 0.7 + images[image_of_text] * 0.3
    similarity = images.astype(np.float64) @ texts.T.astype(np.float64)
    found = recall_at_k(images, texts, image_of_text, chunk=10)
    for k in (1, 5, 10):
        best_texts = np.argsort(-similarity, axis=1)[:, :k]
        best_images = np.argsort(-similarity, axis=0)[:k].T
        assert found[f"text_retrieval_r@{k}"] == (image_of_text[best_texts] == np.arange(37)[:, None]).any(1).mean()
        assert found[f"image_retrieval_r@{k}"] == (best_images == image_of_text[:, None]).any(1).mean()
    assert 0.1 < found["image_retrieval_r@1"] < 0.9


def test_equal_features_tie_whatever_the_chunk():
    """Every image and text twice: the twin always stands first, so nothing is found at 1 and all at 2."""
    draw = np.random.default_rng(1)
    features = unit(draw, 150, 768)
    twins = np.concatenate([features, features])
    for chunk in (7, 64, 300):
        found = recall_at_k(twins, twins, np.arange(300), ks=(1, 2), chunk=chunk)
        assert found == {
            "text_retrieval_r@1": 0,
            "text_retrieval_r@2": 1,
            "image_retrieval_r@1": 0,
            "image_retrieval_r@2": 1,
        }


def test_a_collapsed_model_scores_nothing():
    found = recall_at_k(np.ones((20, 8)), np.ones((20, 8)), np.arange(20))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_features_does_not_matter(scale):
    draw = np.random.default_rng(2)
    images, texts = unit(draw, 30, 16), unit(draw, 30, 16)
    same = recall_at_k((images * np.float32(scale)), texts, np.arange(30))
    assert same == pytest.approx(recall_at_k(images, texts, np.arange(30)))


def test_chance_by_hand():
    """4 texts, image 0 with 3 of them, image 1 with 1, image 2 with none."""
    chance = chance_recall(np.array([0, 0, 1, 0]), num_images=3, ks=(1, 2, 10))
    assert chance["text_retrieval_r@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert chance["text_retrieval_r@2"] == pytest.approx((1 + 1 / 2) / 2)
    assert chance["image_retrieval_r@1"] == pytest.approx(1 / 3)
    assert chance["text_retrieval_r@10"] == chance["image_retrieval_r@10"] == 1


def test_chance_by_simulation():
    draw = np.random.default_rng(3)
    image_of_text = np.repeat(np.arange(12), draw.integers(1, 5, 12))
    runs = []
    for _ in range(400):
        images, texts = unit(draw, 12, 64), unit(draw, len(image_of_text), 64)
        runs.append(recall_at_k(images, texts, image_of_text, ks=(1, 3)))
    for name, expected in chance_recall(image_of_text, 12, ks=(1, 3)).items():
        values = [run[name] for run in runs]
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / 400**0.5, name


def test_refusals():
    ok = np.ones((3, 2), np.float32)
    bad = ok.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        recall_at_k(bad, ok, np.arange(3))
    with pytest.raises(ValueError, match="2 images"):
        recall_at_k(ok[:2], ok, np.arange(3))
    with pytest.raises(ValueError, match="for 3 texts"):
        recall_at_k(ok, ok, np.arange(2))
