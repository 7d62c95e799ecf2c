"""Pictures of what a model does on some rows of a data set: retrieval, the negatives it draws, where words look."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Encoder
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.reader import Columns, Reader, Sources, whole_chunk
from vlmo_ray.data.text import words_of, written
from vlmo_ray.errors import UserError
from vlmo_ray.model.experts import MoMELayer
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.matching import hard_negatives
from vlmo_ray.objectives.pairs import Pairs, columns_of
from vlmo_ray.rng import stream
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.task import given, pixels

_BATCH = 32
_SIDE = 112  # of a picture on the page, in pixels
_TOP = 5


@dataclass(frozen=True)
class Hit:
    """One candidate of a query: a picture (data URI) or a text."""

    shown: str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A picture or a text, its best candidates, and where the right one came."""

    shown: str
    hits: tuple[Hit, ...]
    wanted: Hit  # the first right one
    rank: int  # of the first right candidate, from 0
    missed_by: float  # how much more similar the best wrong candidate is; below 0: found at once


@dataclass(frozen=True)
class Negative:
    """A pair and what is drawn against it."""

    image: str
    text: str
    other_image: str  # for the text
    other_text: str  # for the image
    similarity: float  # of the text and the other image
    matching: tuple[float, float, float] | None  # probabilities: right pair, other image, other text; None: no head


@dataclass(frozen=True)
class Looks:
    """Where each word of a text looks in its image."""

    image: str
    words: tuple[tuple[str, str], ...]  # word, picture


@dataclass
class Gallery:
    """What `Gallery.of` made of the first rows of a data set."""

    data: str
    rows: int
    texts: list[Query] = field(default_factory=list)
    images: list[Query] = field(default_factory=list)
    negatives: list[Negative] = field(default_factory=list)
    looks: list[Looks] = field(default_factory=list)

    @classmethod
    def of(cls, weights: str, data: str, rows: int = 200, shown: int = 8) -> Gallery:
        """Pictures for the model at `weights` (a run, a checkpoint, a folder) on the first `rows` rows of `data`.

        Raises UserError for a model without a contrastive head, and for data that are no pairs.
        """
        model = load(weights).eval()
        matching = Matching(model) if {"itc", "itm"} <= set(model.config.heads) else None
        encoder = (matching or Retrieval(model)).encoder()
        columns = first_rows(data, encoder, rows)
        found = cls(data, len(columns["id"]))
        with torch.inference_mode():
            batch = Batch.from_numpy(columns)
            parts = [Retrieval(model).rows(batch.rows(part)) for part in columns_of(found.rows, _BATCH)]
            feature = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            pictures = [_picture(image) for image in columns["image"]]
            captions = [written(ids) for ids in columns["text_ids"]]
            found.texts, found.images = _retrieval(feature, pictures, captions, shown)
            found.negatives = _negatives(model, matching, batch, feature, pictures, captions, shown)
            if matching is not None:
                found.looks = _looks(model, batch.rows(slice(0, shown // 2)))
        return found


def first_rows(data: str, encoder: Encoder, count: int) -> Columns:
    """The first valid rows of a data set, at most `count`; prepared data sets are in random order. UserError if none
    can be read."""
    sources = Sources((load_manifest(data),))
    reader = Reader(sources.places, encoder)
    parts: list[Columns] = []
    missing = count
    for chunk in range(sources.num_chunks):
        columns = reader(whole_chunk(sources, chunk))
        chosen = np.flatnonzero(columns["valid"])[:missing]
        parts.append({name: column[chosen] for name, column in columns.items()})
        missing -= len(chosen)
        if not missing:
            break
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not parts or not len(joined["id"]):
        raise UserError(f"no row of {data} can be read; `vlmo prepare` says why")
    return joined


def _picture(image: np.ndarray, heat: np.ndarray | None = None) -> str:
    """uint8 [3,H,W] as a data URI; `heat` [g,g] from 0 to 1 is laid over it in red, the rest grows dark."""
    shown = Image.fromarray(image.transpose(1, 2, 0)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    if heat is not None:
        mask = Image.fromarray((255 * heat).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        weight = np.asarray(mask, np.float32)[:, :, None] / 255
        base = np.asarray(shown, np.float32) * (0.35 + 0.65 * weight)
        red = np.array([255, 60, 30], np.float32)
        shown = Image.fromarray((base * (1 - 0.35 * weight) + red * 0.35 * weight).astype(np.uint8))
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _retrieval(
    feature: dict[str, Tensor], pictures: list[str], captions: list[str], shown: int
) -> tuple[list[Query], list[Query]]:
    """Text to image and image to text; each image is one candidate, however many captions it has."""
    keys, first, image_of_text = np.unique(feature["image_key"].numpy(), return_index=True, return_inverse=True)
    similar = (feature["text_feature"] @ feature["image_feature"][torch.from_numpy(first)].T).numpy()  # [texts, images]
    right = image_of_text[:, None] == np.arange(len(keys))[None]
    seen = [pictures[i] for i in first]
    texts = [_query(captions[i], similar[i], right[i], seen) for i in range(len(similar))]
    images = [_query(seen[i], similar[:, i], right[:, i], captions) for i in range(len(keys))]
    return _chosen(texts, shown), _chosen(images, shown)


def _query(shown: str, similar: np.ndarray, right: np.ndarray, candidates: list[str]) -> Query:
    order = np.argsort(-similar, kind="stable")
    rank = int(np.argmax(right[order]))
    hits = [Hit(candidates[i], float(similar[i]), bool(right[i])) for i in (*order[:_TOP], order[rank])]
    wrong = similar[~right].max(initial=-1.0)
    return Query(shown, tuple(hits[:-1]), hits[-1], rank, float(wrong - similar[right].max()))


def _chosen(queries: list[Query], shown: int) -> list[Query]:
    """The worst errors, then right answers; twice as many errors, if there are as many."""
    worst = sorted(queries, key=lambda query: -query.missed_by)
    wrong = [query for query in worst if query.rank > 0]
    right = [query for query in worst if query.rank == 0]
    errors = min(len(wrong), max(shown - shown // 3, shown - len(right)))
    return wrong[:errors] + right[: shown - errors]


def _negatives(
    model: VLMo,
    matching: Matching | None,
    batch: Batch,
    feature: dict[str, Tensor],
    pictures: list[str],
    captions: list[str],
    shown: int,
) -> list[Negative]:
    """What training would draw among these rows."""
    count = len(batch)
    pairs = Pairs(batch.image_key, batch.text_key, batch.valid, 0, count)
    scale = given(model.itc).log_scale
    image, text = feature["image_feature"], feature["text_feature"]
    for_text = hard_negatives(text, image, scale, pairs, stream(0, "report/image"))
    for_image = hard_negatives(image, text, scale, pairs, stream(0, "report/text"))
    rows = torch.arange(count)[(for_text >= 0) & (for_image >= 0)][:shown]
    others, texts = for_text[rows], for_image[rows]
    odds = None
    if matching is not None and len(rows):
        columns = {name: batch.columns[name] for name in ("image", "text_ids", "text_mask")}
        odds = torch.stack(
            [matching.log_odds(columns, *pair) for pair in ((rows, rows), (others, rows), (rows, texts))]
        )
        odds = odds.sigmoid().T
    return [
        Negative(
            pictures[i],
            captions[i],
            pictures[int(others[n])],
            captions[int(texts[n])],
            float(text[i] @ image[others[n]]),
            None if odds is None else tuple(odds[n].tolist()),
        )
        for n, i in enumerate(rows.tolist())
    ]


def _looks(model: VLMo, batch: Batch) -> list[Looks]:
    weights = attention(model, batch.image, batch.text_ids, batch.text_mask)
    grid = math.isqrt(model.config.num_patches)
    found = []
    for row in range(len(batch)):
        image = batch.image[row].numpy()
        words = []
        for word, places in words_of(batch.text_ids[row].numpy()):
            heat = weights[row, places, 1:].mean(dim=0).view(grid, grid)
            words.append((word, _picture(image, (heat / heat.max().clamp(min=1e-9)).numpy())))
        found.append(Looks(_picture(image), tuple(words)))
    return found


def attention(model: VLMo, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """How much each text token of a pair attends to each image token: [B,T,P], the mean over the heads of the layers
    with vision-language experts (without those, of the last layer).

    image: uint8 [B,3,H,W]; ids, mask: [B,T].
    """
    num_text, found = ids.shape[1], []
    first = min(model.config.vl_start, model.config.depth - 1)
    with _watched(model, first, num_text, found):
        model.encode(image=pixels(model, image), text=ids, text_mask=mask)
    return torch.stack(found).mean(dim=0)


@contextmanager
def _watched(model: VLMo, first: int, num_text: int, found: list[Tensor]) -> Iterator[None]:
    def watch(attend, inputs) -> None:
        x, bias, padding, _ = inputs
        found.append(attend.weights(x, bias, padding, num_text).mean(dim=1)[:, :, num_text:])

    watched = [cast(MoMELayer, layer).attention for layer in model.layers[first:]]
    hooks = [attend.register_forward_pre_hook(watch) for attend in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
