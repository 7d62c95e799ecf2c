"""VLMo on Ray: pre-trains, fine-tunes and evaluates a model that is both a dual encoder and a fusion encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmo_ray.model.vlmo import VLMo


def __getattr__(name: str):
    if name == "VLMo":
        from vlmo_ray.model.vlmo import VLMo  # not at the top: see `load`

        return VLMo
    raise AttributeError(f"module 'vlmo_ray' has no attribute {name!r}")


def load(path, **options) -> VLMo:
    """The model of a run, one of its checkpoints, or an imported folder; see `vlmo_ray.runs.load.load`."""
    from vlmo_ray.runs import load as loading  # not at the top: data tasks import this package without torch

    return loading.load(path, **options)
