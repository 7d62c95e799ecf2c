"""Vectors of images or texts by the dual encoder, in their common space: the main contrast of pre-training."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Encoder
from vlmo_ray.data.encoders.alone import Images, Texts
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.task import given, image_states

What = Literal["image", "text"]


def encoder_of(model: VLMo, what: What) -> Encoder:
    """How a record becomes the row that `encode` takes. Raises UserError for a model that has no vectors."""
    if model.itc is None:
        raise UserError("this model has no contrastive head ('itc'), which gives the vectors; load a pre-trained one")
    config = model.config
    return Images(config.image_size, DataConfig()) if what == "image" else Texts(config.max_text_len)


def encode(model: VLMo, what: What, batch: Batch) -> Tensor:
    """The rows of `encoder_of` -> float32 [B,D] of length 1. Without gradients."""
    head = given(model.itc)
    with torch.inference_mode():
        if what == "image":
            return head.image(image_states(model, batch.image, read=1)[:, 0]).float()
        batch = batch.trimmed()
        text = given(model.encode(text=batch.text_ids, text_mask=batch.text_mask, read=1).text)
        return head.text(text[:, 0]).float()


def fingerprint(model: VLMo) -> str:
    """Of all weights: vectors of two models do not compare."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
