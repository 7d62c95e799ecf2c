"""The vision stage: masked image modelling on images alone (paper section 3.4)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ray.config import Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.patches import MaskedImages
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.vision import VisionConfig
from vlmo_ray.rng import Noise
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Evaluation,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    by_row,
    given,
    in_image_pass,
    joined,
    pixels,
)


class Tokenizer(Protocol):
    """Discrete targets, as BEiT's. Its weights are not trained, and must be the same on all workers."""

    vocab_size: int

    def __call__(self, image: Tensor) -> Tensor:
        """[B,3,H,W] from -1 to 1 -> int64 [B, patches], row by row."""
        ...


class Vision(Task):
    """Patches are replaced by a learned vector after the projection, and predicted from the last states there."""

    shown = ("mim",)

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, VisionConfig)
        self.settings, self.data = config.task, config.data
        if "image" not in schema:
            raise UserError("the task vision needs an 'image' column: `vlmo prepare folders ... --option labels=no`")
        self.tokenizer = _tokenizer(self.settings.target) if ":" in self.settings.target else None
        self.features = self.settings.target == "features"
        size = model.config.width if self.features else 3 * model.config.patch_size**2
        size = size if self.tokenizer is None else self.tokenizer.vocab_size
        self.head = nn.Linear(model.config.width, size)
        self.init_linear("head", self.head)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.config.width))

    def encoder(self) -> MaskedImages:
        config, settings = self.model.config, self.settings
        grid = config.image_size // config.patch_size
        return MaskedImages(config.image_size, grid, settings.mask, settings.mask_share, self.data)

    def trainable(self, name: str) -> bool:
        return not name.startswith("model.") or in_image_pass(name)

    def counts(self, batch: Batch) -> Counts:
        return super().counts(batch) | {"patches": _masked(batch).sum()}

    def taught_share(self, step: int) -> float:
        return float(self.features)

    def teach(self, batch: Batch) -> dict[str, Tensor]:
        """The states of the whole image, each with mean 0 and deviation 1 (data2vec, Baevski et al. 2022)."""
        states = given(self.model.encode(image=pixels(self.model, batch.image)).image)[:, 1:]
        return {"taught": normalised(states.to(torch.promote_types(states.dtype, torch.float32)))}

    def predict(self, batch: Batch, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """(error, whether it is right) of each masked patch of valid rows, [M], in order; only tokens can be right."""
        image, masked = pixels(self.model, batch.image), _masked(batch)
        tokens = self.model.embed_image(image, masked=batch.masked, mask_token=self.mask_token)
        states = given(self.model.encode(image=tokens, noise=noise).image)[:, 1:]
        found = self.head(states[masked])
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if self.tokenizer is not None:
            with torch.no_grad():
                wanted = self.tokenizer(image)[masked]
            return F.cross_entropy(found, wanted, reduction="none"), found.argmax(dim=1) == wanted
        if self.features:  # in an evaluation the weights are the teacher's
            wanted = (batch if "taught" in batch.columns else batch.with_columns(**self.teach(batch))).taught[masked]
        else:
            wanted = normalised(patches(image, self.model.config.patch_size)[masked].to(found.dtype))
        return (found - wanted).square().mean(dim=1), torch.zeros_like(found[:, 0], dtype=torch.bool)

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        error, right = self.predict(batch, self.noise("image", batch.position, step))
        return Losses({"mim": Term(error.sum() / totals["patches"].clamp(min=1))}, {"right": right.sum()})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {} if self.tokenizer is None else {"mim_accuracy": sums["right"] / totals["patches"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        # pixels and features have the variance 1
        return {"mim": 1.0 if self.tokenizer is None else math.log(self.tokenizer.vocab_size)}

    def passes(self) -> list[Pass]:
        return [Pass(0, image=True)]

    def taught_passes(self) -> list[Pass]:
        return self.passes() if self.features else []

    def evaluation(self, schema: Schema) -> MaskedPatches:
        return MaskedPatches(self)


class MaskedPatches(Evaluation):
    """Of pixels and features the share of their variance in the masked patches that is predicted; of tokens the share
    that is right. And what is minimised."""

    def __init__(self, task: Vision):
        self.task = task

    def encoder(self) -> MaskedImages:
        return self.task.encoder()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        masked = _masked(batch)
        error, right = self.task.predict(batch)
        return {"error": by_row(error, masked), "right": by_row(right, masked), "patches": masked.sum(dim=1)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        count = int(found["patches"].sum())
        error, right = (float(np.sum(found[name])) / max(1, count) for name in ("error", "right"))
        if (tokenizer := self.task.tokenizer) is not None:
            chance = math.log(tokenizer.vocab_size)
            accuracy = Score(right, 1 / tokenizer.vocab_size, count)
            return {"masked_patch_accuracy": accuracy, "mim": Score(error, chance, count, is_share=False)}
        explained = Score(1 - error, 0.0, count)
        return {"masked_patch_variance": explained, "mim": Score(error, 1.0, count, is_share=False)}


def patches(image: Tensor, size: int) -> Tensor:
    """[B,3,H,W] -> [B,P,3*size*size]: the pixels of each patch, patches row by row."""
    side = image.shape[-1] // size
    cut = image.unflatten(3, (side, size)).unflatten(2, (side, size))  # [B,3,h,s,w,s]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def normalised(values: Tensor) -> Tensor:
    """The last axis with mean 0 and deviation 1 (MAE, He et al. 2022)."""
    values = values - values.mean(dim=-1, keepdim=True)
    return values / (values.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def _masked(batch: Batch) -> Tensor:
    return batch.masked & batch.valid[:, None]


def _tokenizer(target: str) -> Tokenizer:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.target={target!r} cannot be imported on the workers: {error}") from error
