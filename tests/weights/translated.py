"""What the tests of released files share: a state dict in memory as weights under our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmo_ray.config import ModelConfig
from vlmo_ray.weights.folder import Report
from vlmo_ray.weights.official import translate
from vlmo_ray.weights.resize import fit_state


def from_official(
    state_dict: Mapping[str, Any],
    *,
    image_size: int | None = None,
    heads: tuple[str, ...] | None = None,
    max_text_len: int | None = None,
    **told: Any,
) -> tuple[ModelConfig, dict[str, Tensor], Report]:
    """(configuration, weights, report) of a released state dict, as `load_model` takes it from a file."""
    official = translate(state_dict, max_text_len=max_text_len, **told)
    asked = {"image_size": image_size, "max_text_len": max_text_len, "heads": heads}
    config = replace(official.config, **{name: value for name, value in asked.items() if value is not None})
    fitted = fit_state(official.state, official.config, config)
    return config, fitted.state, Report.of(official, fitted)
