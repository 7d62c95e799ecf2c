"""How well each image and its own text fit, by the dual encoder: to find pairs that are noise."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.pairs import Pairs
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.task import Columns, Score, ZeroShot, joined


class Similarity(ZeroShot):
    """The cosine of the features of each pair, in the main contrastive branch; its mean and deciles.

    The predictions have it as `score` for every id, which `vlmo prepare ... --scores FILE --keep-above X` filters by.
    """

    def __init__(self, model: VLMo, schema: Schema = PAIRS):
        self._features = Retrieval(model, schema)

    def encoder(self) -> Pairs:
        return self._features.encoder()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        found = self._features.rows(batch)
        return {"cosine": (found["image_feature"] * found["text_feature"]).sum(dim=1)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        cosine = joined(blocks)["cosine"]
        found = {"similarity": float(np.mean(cosine, dtype=np.float64))}
        found |= {f"similarity_p{p}": float(np.percentile(cosine, p)) for p in (10, 30, 50, 70, 90)}
        return {name: Score(value, None, len(cosine), is_share=False) for name, value in found.items()}

    def predictions(self, block: Columns) -> Columns:
        return {"id": block["id"], "score": block["cosine"]}
