"""Task metrics as pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np


def recall_at_k(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
    asked: np.ndarray | None = None,
) -> dict[str, float]:
    """Retrieval recall by dot product, in [0, 1] (paper section 4.3, Table 2).

    `image_features` float32 `[M, D]`, `text_features` float32 `[N, D]`, `image_of_text` int `[N]`: the row of
    the image that each text belongs to. `text_retrieval_r@k` is the share of images with any of their texts
    among the k best texts; `image_retrieval_r@k` the share of texts with their image among the k best images.
    An image without a text is a candidate for every text, but asks for none itself. `asked`, bool `[M]`,
    limits the queries to those images and their texts; the candidates stay all.

    A tie counts against the model: a wrong candidate as similar as the right one stands before it, so a
    model that maps everything to one point scores 0, not 1. `[chunk, chunk]` similarities exist at a
    time, and they are exact (see `_fixed_point`), so the result depends neither on `chunk` nor on the BLAS.

    Raises `ValueError` for features that are not finite, indices outside the images, or no query at all.
    """
    image_of_text = np.asarray(image_of_text)
    num_images, num_texts = len(image_features), len(text_features)
    if image_of_text.shape != (num_texts,) or not num_texts:
        raise ValueError(f"{image_of_text.shape} image indices for {num_texts} texts; give one for each text")
    if image_of_text.min() < 0 or image_of_text.max() >= num_images:
        span = f"{image_of_text.min()} to {image_of_text.max()}"
        raise ValueError(f"image_of_text spans {span}, but there are {num_images} images")
    images, texts = _fixed_point(image_features), _fixed_point(text_features)

    own = np.concatenate([np.einsum("nd,nd->n", texts[c], images[image_of_text[c]]) for c in _chunks(num_texts, chunk)])
    best_own = np.full(num_images, -np.inf)
    np.maximum.at(best_own, image_of_text, own)

    # Candidates at least as similar as the right one; the right ones among them are taken off first.
    text_rank = -np.bincount(image_of_text[own == best_own[image_of_text]], minlength=num_images)
    image_rank = np.full(num_texts, -1)
    for i in _chunks(num_images, chunk):
        for t in _chunks(num_texts, chunk):
            similarity = images[i] @ texts[t].T
            text_rank[i] += (similarity >= best_own[i, None]).sum(axis=1)
            image_rank[t] += (similarity >= own[t]).sum(axis=0)

    queries = np.isfinite(best_own)
    if asked is not None:
        queries &= asked
        image_rank = image_rank[queries[image_of_text]]
    text_rank = text_rank[queries]
    if not len(text_rank):
        raise ValueError("no image that is asked for has a text among those given")
    return _named(ks, lambda k: (text_rank < k).mean(), lambda k: (image_rank < k).mean())


def chance_recall(image_of_text: np.ndarray, num_images: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What `recall_at_k` expects of a random ranking of distinct similarities, under the same names.

    An image with n of the N texts finds none of them among k with probability C(N - n, k) / C(N, k).
    """
    num_texts = len(image_of_text)
    texts_of_image = np.bincount(image_of_text, minlength=num_images)
    counts, num_with_count = np.unique(texts_of_image[texts_of_image > 0], return_counts=True)

    def text_retrieval(k: int) -> float:
        if k >= num_texts:
            return 1.0
        misses = [math.comb(num_texts - int(n), k) / math.comb(num_texts, k) for n in counts]
        return 1.0 - float(np.average(misses, weights=num_with_count))

    return _named(ks, text_retrieval, lambda k: min(1.0, k / num_images))


def _named(ks, text_retrieval, image_retrieval) -> dict[str, float]:
    return {f"text_retrieval_r@{k}": float(text_retrieval(k)) for k in ks} | {
        f"image_retrieval_r@{k}": float(image_retrieval(k)) for k in ks
    }


def _chunks(n: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, n)) for first in range(0, n, chunk))


def _fixed_point(features: np.ndarray) -> np.ndarray:
    """Features times a power of two, rounded to whole numbers in float64, the longest row below 2^26.

    Products of two such rows and all their partial sums are whole numbers below 2^53 (Cauchy-Schwarz), so
    float64 adds them without rounding in any order: equal features tie exactly, which a
    floating-point product, whose blocking depends on the shape, does not promise. The rounding, 2^-27 of the
    longest row, is finer than float32's own.
    """
    features = np.asarray(features, dtype=np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features are not finite, so no ranking exists")
    longest = float(np.sqrt((features**2).sum(axis=1).max()))
    exponent = math.frexp(longest)[1]  # longest < 2^exponent
    return np.rint(np.ldexp(features, 26 - exponent))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive score `[P]` is above a negative one `[N]`; equal ones count half (Mann-Whitney)."""
    below = np.searchsorted(np.sort(negative), positive, side="left")
    not_above = np.searchsorted(np.sort(negative), positive, side="right")
    return float((below + not_above).sum() / (2 * len(positive) * len(negative)))


def auc_error(value: float, num_positive: int, num_negative: int) -> float:
    """The standard error of `auc` (Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve")."""
    two_positive, two_negative = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value)
    variance += (num_positive - 1) * (two_positive - value**2) + (num_negative - 1) * (two_negative - value**2)
    return math.sqrt(variance / (num_positive * num_negative))
