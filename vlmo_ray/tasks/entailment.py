"""Visual entailment (SNLI-VE): does an image entail a sentence, contradict it, or neither?"""

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
from vlmo_ray.model.heads import ClassifierHead
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.entailment import EntailmentConfig
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Evaluation,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    in_pair_pass,
    joined,
    pooled,
    share,
)


class Entailment(Task):
    """Cross-entropy over the classes of the data set's `label` column, three for SNLI-VE."""

    shown = ("cross_entropy", "accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, EntailmentConfig)
        self.settings, self.data = config.task, config.data
        if "label" not in schema or len(schema.field("label").values) < 2:
            raise UserError("entailment needs a 'label' column with its classes: `vlmo prepare snli_ve`")
        self.names = schema.field("label").values
        width = model.config.width
        self.head = ClassifierHead(width, 2 * width, len(self.names))
        for name in ("hidden", "out"):
            self.init_linear(f"head.{name}", getattr(self.head, name))

    def encoder(self) -> Statements:
        config = self.model.config
        return Statements(config.image_size, config.max_text_len, self.names, self.data)

    def trainable(self, name: str) -> bool:
        return name.startswith("head.") or in_pair_pass(name, self.model.config)

    def lr_scale(self, name: str) -> float:
        return self.settings.head_lr_scale if name.startswith("head.") else 1.0

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        logits = self.head(pooled(self.model, batch, self.noise("pair", batch.position, step)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(logits, batch.label, reduction="none")
        right = (logits.argmax(dim=1) == batch.label) & batch.valid
        loss = (each * batch.valid).sum() / totals["rows"].clamp(min=1)
        return Losses({"cross_entropy": Term(loss)}, {"right": right.sum()})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"accuracy": sums["right"] / totals["rows"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        return {"cross_entropy": math.log(len(self.names))}

    def passes(self) -> list[Pass]:
        return [Pass(self.model.config.max_text_len, image=True)]

    def evaluation(self, schema: Schema) -> Accuracy:
        return Accuracy(self)


class Accuracy(Evaluation):
    """The share of right labels. Chance is the share of the most frequent one."""

    def __init__(self, task: Entailment):
        self.task = task

    def encoder(self) -> Statements:
        config = self.task.model.config
        return Statements(config.image_size, config.max_text_len, self.task.names, DataConfig())

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        score, chosen = self.task.head(pooled(self.task.model, batch)).float().softmax(dim=1).max(dim=1)
        return {"chosen": chosen, "score": score, "label": batch.label}

    def predictions(self, block: Columns) -> Columns:
        names = np.array(self.task.names, dtype=object)
        chosen, truth = names[block["chosen"]], names[block["label"]]
        return {"id": block["id"], "prediction": chosen, "score": block["score"], "truth": truth}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        chance = np.bincount(found["label"]).max() / len(found["label"])
        return {"accuracy": share(found["chosen"] == found["label"], float(chance))}
