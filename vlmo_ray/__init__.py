"""VLMo on Ray: pre-train, fine-tune and evaluate one model that is both dual encoder and fusion encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmo_ray.model.vlmo import VLMo


def load(path, **options) -> VLMo:
    """The model in a folder of ours or in a released file; `options` are those of `convert.load_model`."""
    from vlmo_ray.convert import load_model  # here, so that data tasks import this package without torch

    return load_model(path, **options)
