"""Image classification with the image encoder (paper section 4.4): patches are averaged, one linear layer follows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ray.config import Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.classes import Classes
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.classification import ClassificationConfig
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Evaluation,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    image_states,
    in_image_pass,
    joined,
    layer_rate,
)


class Classification(Task):
    """One label an image; the classes are those of the data set's `label` column."""

    shown = ("cross_entropy", "accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, ClassificationConfig)
        self.settings, self.data = config.task, config.data
        if "label" not in schema or len(schema.field("label").values) < 2:
            raise UserError("classification needs a 'label' column with two or more classes: `vlmo prepare folders`")
        self.names = schema.field("label").values
        self.head = nn.Linear(model.config.width, len(self.names))
        self.init_linear("head", self.head)

    def encoder(self) -> Classes:
        return Classes(self.model.config.image_size, self.names, self.data)

    def trainable(self, name: str) -> bool:
        return in_image_pass(name)

    def lr_scale(self, name: str) -> float:
        if name.startswith("head."):
            return self.settings.head_lr_scale
        return layer_rate(name, self.model.config.depth, self.settings.layer_decay)

    def logits(self, image: Tensor, noise=None) -> Tensor:
        """uint8 [B,3,H,W] -> [B,C]."""
        return self.head(image_states(self.model, image, noise)[:, 1:].mean(dim=1))

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        logits = self.logits(batch.image, self.noise("image", batch.position, step))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.settings.label_smoothing
        each = F.cross_entropy(logits, batch.label, reduction="none", label_smoothing=smoothing)
        right = (logits.argmax(dim=1) == batch.label) & batch.valid
        loss = (each * batch.valid).sum() / totals["rows"].clamp(min=1)
        return Losses({"cross_entropy": Term(loss)}, {"right": right.sum()})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"accuracy": sums["right"] / totals["rows"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        return {"cross_entropy": math.log(len(self.names))}

    def passes(self) -> list[Pass]:
        return [Pass(0, image=True)]

    def evaluation(self, schema: Schema) -> TopK:
        return TopK(self)


class TopK(Evaluation):
    """The share of images whose class is among the 1 and the 5 with the highest logits."""

    def __init__(self, task: Classification):
        self.task = task

    def encoder(self) -> Classes:
        return self.task.encoder()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        return {"rank": rank_of(self.task.logits(batch.image), batch.label)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        return top_k(joined(blocks)["rank"], len(self.task.names))


def rank_of(logits: Tensor, label: Tensor) -> Tensor:
    """How many classes stand before the right one, [B]; a wrong class as high as the right one does."""
    return (logits >= logits.gather(1, label[:, None])).sum(dim=1) - 1


def top_k(rank: np.ndarray, num_classes: int) -> dict[str, Score]:
    """The shares of images whose class is among the 1 and the 5 highest."""
    ks = (1, 5) if num_classes > 5 else (1,)
    return {f"top{k}": Score(float((rank < k).mean()), k / num_classes, len(rank)) for k in ks}
