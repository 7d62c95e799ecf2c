"""Image-text retrieval with the dual encoder (paper sections 3.5 and 4.3), zero-shot or fine-tuned for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from torch import Tensor

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.pairs import Pairs
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.metrics import chance_recall, recall_at_k
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.tasks.task import Columns, Score, ZeroShot, given, image_states, joined, texts_of


class RetrievalTuning(Pretraining):
    """The contrast of pre-training without its other terms. Captions of one image do not oppose each other."""


class Retrieval(ZeroShot):
    """Recall at 1, 5 and 10 in both directions, with the main contrastive branch, and `rsum`, their sum in percent.

    Every distinct image of the data set is a candidate for every text, and the other way round; all texts count. With
    `folds` above 1, `folds_...` are the means over so many equal parts of the images, each searched alone: 5 on COCO's
    5,000 test images are its "1k" protocol. Images are in the order of a hash of their ids, as a prepared data set is
    shuffled. `subset` names images (`image_id`); their queries are then also scored alone, as `subset_...`, over the
    same candidates.
    """

    def __init__(self, model: VLMo, schema: Schema = PAIRS, subset: Collection[str] = (), folds: int = 1):
        if model.itc is None:
            raise UserError("this model has no contrastive head ('itc'), which retrieval needs; load a pre-trained one")
        if folds < 1:
            raise UserError(f"folds={folds} of retrieval must be at least 1")
        self.model, self.head, self.folds = model, model.itc, folds
        self.subset = {rng.hash_text(name): name for name in texts_of("subset", subset)}
        self._absent: list[str] = []

    def encoder(self) -> Pairs:
        config = self.model.config
        return Pairs(config.image_size, config.max_text_len, DataConfig())

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.trimmed()
        image = image_states(self.model, batch.image, read=1)
        text = given(self.model.encode(text=batch.text_ids, text_mask=batch.text_mask, read=1).text)
        return {
            "image_feature": self.head.image(image[:, 0]).float(),
            "text_feature": self.head.text(text[:, 0]).float(),
            "image_key": batch.image_key,
        }

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        keys, first, image_of_text = np.unique(found["image_key"], return_index=True, return_inverse=True)
        images, texts = found["image_feature"][first], found["text_feature"]
        chance = chance_recall(image_of_text, len(keys))
        reached = recall_at_k(images, texts, image_of_text)
        scores = _scores("", reached, chance, len(keys), len(texts))
        total, by_chance = (100 * sum(values.values()) for values in (reached, chance))
        scores["rsum"] = Score(total, by_chance, len(keys) + len(texts), is_share=False)
        if self.folds > 1:
            scores |= self._folds(images, texts, image_of_text)
        if self.subset:
            asked = np.isin(keys, list(self.subset))
            self._absent = sorted(self.subset[key] for key in self.subset.keys() - set(keys.tolist()))
            if not asked.any():
                raise UserError(f"no image of subset, for example {self._absent[0]!r}, is among those of the data set")
            reached = recall_at_k(images, texts, image_of_text, asked=asked)
            num_texts = int(asked[image_of_text].sum())
            scores |= _scores("subset_", reached, chance, int(asked.sum()), num_texts)
        return scores

    def remark(self, scores: dict[str, Score]) -> str:
        if not self._absent:
            return ""
        return f"{len(self._absent)} images of subset were not scored, for example {self._absent[0]!r}"

    def _folds(self, images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray) -> dict[str, Score]:
        if len(images) % self.folds:
            raise UserError(f"{len(images):,} images do not divide into folds={self.folds}")
        size = len(images) // self.folds
        reached, chance = [], []
        for first in range(0, len(images), size):
            inside = (image_of_text >= first) & (image_of_text < first + size)
            own = image_of_text[inside] - first
            reached.append(recall_at_k(images[first : first + size], texts[inside], own))
            chance.append(chance_recall(own, size))

        def mean(found: list[dict[str, float]]) -> dict[str, float]:
            return {name: sum(fold[name] for fold in found) / self.folds for name in found[0]}

        return _scores("folds_", mean(reached), mean(chance), len(images), len(texts))


def _scores(
    prefix: str, reached: dict[str, float], chance: dict[str, float], num_images: int, num_texts: int
) -> dict[str, Score]:
    counts = {name: num_images if name.startswith("text_retrieval") else num_texts for name in reached}
    return {f"{prefix}{name}": Score(reached[name], chance[name], counts[name]) for name in reached}
