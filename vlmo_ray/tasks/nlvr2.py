"""NLVR2: is a statement true of two images? Two fused pairs, pooled and joined, two classes (paper section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import Config, DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.statements import Statements
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.nlvr2 import Nlvr2Config
from vlmo_ray.rng import Noise
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    ZeroShot,
    given,
    in_pair_pass,
    joined,
    pooled,
    share,
)

NAMES = ("False", "True")
IMAGES = ("image", "image_2")  # left and right


def logits_of(model: VLMo, batch: Batch, noise: Noise | None = None, noise_2: Noise | None = None) -> Tensor:
    """[B,2]. The second image has its own row of the modality embedding."""
    left = pooled(model, batch, noise)
    right = pooled(model, batch, noise_2, image=batch.image_2, image_slot=2)
    logits = given(model.nlvr2)(torch.cat([left, right], dim=1))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Nlvr2(Task):
    """Cross-entropy over False and True."""

    shown = ("cross_entropy", "accuracy", "predicted_true")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, Nlvr2Config)
        self.settings, self.data = config.task, config.data
        _check(model, schema)

    def encoder(self) -> Statements:
        config = self.model.config
        return Statements(config.image_size, config.max_text_len, NAMES, self.data, IMAGES)

    def trainable(self, name: str) -> bool:
        return name.startswith("model.nlvr2.") or in_pair_pass(name, self.model.config)

    def lr_scale(self, name: str) -> float:
        return self.settings.head_lr_scale if name.startswith("model.nlvr2.") else 1.0

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        noise = (self.noise(name, batch.position, step) for name in ("pair", "pair_2"))
        logits = logits_of(self.model, batch, *noise)
        each = F.cross_entropy(logits, batch.label, reduction="none")
        chosen = logits.argmax(dim=1)
        loss = (each * batch.valid).sum() / totals["rows"].clamp(min=1)
        sums = {"right": ((chosen == batch.label) & batch.valid).sum(), "true": ((chosen == 1) & batch.valid).sum()}
        return Losses({"cross_entropy": Term(loss)}, sums)

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        rows = totals["rows"].clamp(min=1)
        return {"accuracy": sums["right"] / rows, "predicted_true": sums["true"] / rows}

    def chance(self, global_batch: int) -> dict[str, float]:
        return {"cross_entropy": math.log(2)}

    def passes(self) -> list[Pass]:
        return [Pass(self.model.config.max_text_len, image=True)] * 2

    def evaluation(self, schema: Schema) -> Nlvr2Accuracy:
        return Nlvr2Accuracy(self.model, schema)


def _check(model: VLMo, schema: Schema) -> None:
    if model.nlvr2 is None:
        raise UserError("the model has no 'nlvr2' head, which the task nlvr2 needs; see docs/tasks/nlvr2.md")
    if missing := [name for name in (*IMAGES, "text", "label") if name not in schema]:
        raise UserError(f"nlvr2 needs a column {missing[0]!r}, which the data set lacks: `vlmo prepare nlvr2`")


class Nlvr2Accuracy(ZeroShot):
    """Accuracy, and consistency: the share of sentences all of whose pairs of images are judged right.

    Chance is the share of the more frequent label; of consistency, what always giving that label would reach.
    """

    def __init__(self, model: VLMo, schema: Schema):
        self.model, self.schema = model, schema
        _check(model, schema)

    def encoder(self) -> Statements:
        config = self.model.config
        with_sentence = "sentence" in self.schema
        return Statements(config.image_size, config.max_text_len, NAMES, DataConfig(), IMAGES, with_sentence)

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        score, chosen = logits_of(self.model, batch).softmax(dim=1).max(dim=1)
        keys = {"sentence_key": batch.sentence_key} if "sentence_key" in batch.columns else {}
        return {"chosen": chosen, "score": score, "label": batch.label} | keys

    def predictions(self, block: Columns) -> Columns:
        names = np.array(NAMES, dtype=object)
        chosen, truth = names[block["chosen"]], names[block["label"]]
        return {"id": block["id"], "prediction": chosen, "score": block["score"], "truth": truth}

    def submission(self, ids: list[str], predictions: list[str]) -> bytes:
        """The CSV of the official `metrics.py`: identifier,True or identifier,False, without a header."""
        return "".join(f"{name},{word}\n" for name, word in zip(ids, predictions, strict=True)).encode()

    def remark(self, scores: dict[str, Score]) -> str:
        share_true = scores["predicted_true"].value
        if min(share_true, 1 - share_true) > 0.02:
            return ""
        word = NAMES[int(share_true > 0.5)]
        return f"nearly all statements are judged {word}: the model has not left the majority class"

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        label, right = found["label"], found["chosen"] == found["label"]
        majority = np.bincount(label, minlength=2).argmax()
        scores = {"accuracy": share(right, float((label == majority).mean()))}
        scores["predicted_true"] = share(found["chosen"] == 1)
        if "sentence_key" in found:
            _, sentence = np.unique(found["sentence_key"], return_inverse=True)
            chance = _all_of_each(label == majority, sentence).mean()
            scores["consistency"] = share(_all_of_each(right, sentence), float(chance))
        return scores


def _all_of_each(right: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Bool, one for each group: whether all its members are right."""
    return np.bincount(group, weights=~right) == 0
