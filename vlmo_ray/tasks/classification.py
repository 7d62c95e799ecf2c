"""Image classification with the image encoder (paper section 4.4): patches are averaged, one linear layer follows.

Images and labels are mixed as in timm's `Mixup` of mode "batch", except that a row's partner is the mirror row of its
slice, not of its batch: a worker has whole slices, so it has the partner of each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ray import rng
from vlmo_ray.config import Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.classes import Classes
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.pairs import full_precision
from vlmo_ray.recipes.classification import ClassificationConfig
from vlmo_ray.tasks.metrics.imagenet import has_wordnet_ids, real_labels, real_top1
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
    pixels,
)

_HEAD_SCALE = 0.001  # of a head after a norm of its own, at the start: all classes are about as likely


class Classification(Task):
    """One label an image; the classes are those of the data set's `label` column."""

    shown = ("cross_entropy", "accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, ClassificationConfig)
        self.settings, self.data, self.slice_size = config.task, config.data, config.slice_size
        if "label" not in schema or len(schema.field("label").values) < 2:
            raise UserError("classification needs a 'label' column with two or more classes: `vlmo prepare folders`")
        self.names = schema.field("label").values
        width = model.config.width
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if self.settings.head == "mean_norm" else None
        self.head = nn.Linear(width, len(self.names))
        self.init_linear("head", self.head)
        if self.fc_norm is not None:
            with torch.no_grad():
                self.head.weight.mul_(_HEAD_SCALE)

    def encoder(self) -> Classes:
        return Classes(self.model.config.image_size, self.names, self.data, self.settings.eval_crop == "center")

    def trainable(self, name: str) -> bool:
        unused = self.fc_norm is not None and name.startswith("model.norm.")
        return in_image_pass(name) and not unused

    def lr_scale(self, name: str) -> float:
        if name.startswith("head."):
            return self.settings.head_lr_scale
        if name.startswith("fc_norm."):
            return 1.0
        return layer_rate(name, self.model.config.depth, self.settings.layer_decay)

    def logits(self, image: Tensor, noise=None) -> Tensor:
        """[B,3,H,W], values from 0 to 255 -> [B,C]."""
        return self.head(self.features(image, noise))

    def features(self, image: Tensor, noise=None) -> Tensor:
        """What the head reads, [B,D]."""
        if self.fc_norm is None:
            return image_states(self.model, image, noise)[:, 1:].mean(dim=1)
        last = self.model.config.depth - 1
        [states] = self.model.encode(image=pixels(self.model, image), noise=noise, layers=(last,)).layers
        return self.fc_norm(states[:, 1:].mean(dim=1))

    def prepared(self, batch: Batch, step: int) -> Batch:
        settings = self.settings
        if not settings.mixes:
            return batch
        drawn = draw_mixing(settings.mixup, settings.cutmix, self.model.config.image_size, self.seed, step)
        return mixed(batch, drawn, self.slice_size, self.model.dtype)

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        logits = self.logits(batch.image, self.noise("image", batch.position, step))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

        def against(label: Tensor) -> Tensor:
            return F.cross_entropy(logits, label, reduction="none", label_smoothing=self.settings.label_smoothing)

        each, label = against(batch.label), batch.label
        if self.settings.mixes:
            each = batch.share * each + (1 - batch.share) * against(batch.partner_label)
            label = torch.where(batch.share < 0.5, batch.partner_label, label)
        right = (logits.argmax(dim=1) == label) & batch.valid
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


@dataclass(frozen=True)
class Mixing:
    """How all images of a step are mixed with their partners."""

    share: float  # of the image itself
    box: tuple[int, int, int, int] | None = None  # top, left, bottom, right: what comes from the partner; None: mixup


def draw_mixing(mixup: float, cutmix: float, size: int, seed: int, step: int) -> Mixing:
    """With both, one or the other with equal probability (`mixup` and `cutmix` are the parameters of their beta
    distributions, 0: never). The box of cutmix is cut off at the border of the image of `size` x `size` pixels, and the
    share is what is left."""
    draws = rng.generator(seed, "mixing", step, 0)
    switch, y, x = draws.random(3)
    if not cutmix or (mixup and switch >= 0.5):
        return Mixing(float(draws.beta(mixup, mixup)))
    side = int(size * math.sqrt(1 - draws.beta(cutmix, cutmix)))
    (top, bottom), (left, right) = (
        (max(0, middle - side // 2), min(size, middle + (side + 1) // 2)) for middle in (int(y * size), int(x * size))
    )
    return Mixing(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))


def mixed(batch: Batch, mixing: Mixing, slice_size: int, dtype: torch.dtype) -> Batch:
    """The rows with images of `dtype`, mixed with the mirror rows of their slices, and two more columns:
    `partner_label` int64 [B], and `share` [B] of the row's own image and label. Where a row or its partner is invalid,
    the share is 1.
    """
    mirror = torch.arange(len(batch), device=batch.valid.device).view(-1, slice_size).flip(1).flatten()
    image = batch.image.to(dtype)
    part = torch.zeros_like(image[0, 0])  # of the partner, [H,W]
    if mixing.box is None:
        part += 1 - mixing.share
    else:
        top, left, bottom, right = mixing.box
        part[top:bottom, left:right] = 1
    pairs = (batch.valid & batch.valid[mirror]).to(dtype)
    image = image.lerp(image[mirror], pairs[:, None, None, None] * part)
    share = 1 - pairs * (1 - mixing.share)
    return batch.with_columns(image=image, partner_label=batch.label[mirror], share=share)


class TopK(Evaluation):
    """The share of images whose class is among the 1 and the 5 with the highest logits; on ImageNet's validation images
    also `real_top1`, by their ReaL labels."""

    def __init__(self, task: Classification):
        self.task = task

    def encoder(self) -> Classes:
        return self.task.encoder()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        features = self.task.features(batch.image)
        with full_precision(features.device):  # in bfloat16 several classes would often be equally high
            logits = self.task.head(features.to(self.task.head.weight.dtype))
        return {"rank": rank_of(logits, batch.label), "best": logits.argmax(dim=1)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found, names = joined(blocks), self.task.names
        real = real_top1(list(found["id"]), found["best"], names)
        return top_k(found["rank"], len(names)) | ({} if real is None else {"real_top1": real})

    def remark(self, scores: dict[str, Score]) -> str:
        if "real_top1" in scores or not has_wordnet_ids(self.task.names) or real_labels() is not None:
            return ""
        return "real_top1 is left out: the ReaL labels are in the package timm, which is not installed"


def rank_of(logits: Tensor, label: Tensor) -> Tensor:
    """How many classes stand before the right one, [B]: all whose logit is not lower. A tie counts against the model,
    and so does a NaN."""
    return (~(logits < logits.gather(1, label[:, None]))).sum(dim=1) - 1


def top_k(rank: np.ndarray, num_classes: int) -> dict[str, Score]:
    """The shares of images whose class is among the 1 and the 5 highest."""
    ks = (1, 5) if num_classes > 5 else (1,)
    return {f"top{k}": Score(float((rank < k).mean()), k / num_classes, len(rank)) for k in ks}
