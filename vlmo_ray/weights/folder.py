"""Reads and writes weights: released files, and our folders.

A folder holds the weights under our names in `model.safetensors` and the configuration in `model.json`. An imported one
also holds everything else from the released file in `carried.safetensors`, so an export gives back every key and bit.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.hub import DESCRIPTION, VERSION, WEIGHTS, described
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.overrides import model_from_dict
from vlmo_ray.weights.official import MODULE, OURS, Official, index_buffers, shorten, to_official, translate
from vlmo_ray.weights.resize import Fitted, fit_state

_CARRIED = "carried.safetensors"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every key of a released file."""

    wrapper: str  # "state_dict", "module", "model", or "" for a bare state dict
    used: tuple[str, ...]  # our names of the weights that were taken
    carried: dict[str, Tensor]  # under released names: not used by this model, kept for an export
    dropped: tuple[str, ...]  # not taken: heads that were not asked for, BEiT's classifier
    missing: tuple[str, ...]  # our names of parameters that the file lacks

    @classmethod
    def of(cls, official: Official, fitted: Fitted) -> Report:
        dropped = (*official.dropped, *fitted.dropped)
        return cls(official.wrapper, tuple(fitted.state), official.carried, dropped, tuple(fitted.missing))

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        for what in ("carried", "dropped", "missing"):
            names = list(getattr(self, what))
            lines += [f"{len(names)} {what}: {shorten(names)}"] if names else []
        return "\n".join(lines)


def read_tensors(path: str | Path) -> Mapping[str, Any]:
    """Reads a .safetensors file or a PyTorch file of tensors. Never runs code from the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a PyTorch file of tensors, or holds objects that could run code when read, so it "
            "was not read. If you trust it, load it in Python and save its state dict alone with torch.save."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read, it may be cut short: {reason}") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a state dict.")
    return checkpoint


def import_official(
    path: str | Path, out: str | Path, *, num_heads: int | None = None, bias_text_len: int | None = None
) -> Report:
    """Writes the released file `path` as a folder `out`; every tensor keeps its bits and dtype."""
    official = translate(read_tensors(path), num_heads=num_heads, bias_text_len=bias_text_len)
    fitted = fit_state(official.state, official.config, official.config)  # checks the shapes
    description = {"official": {"wrapper": official.wrapper, "keys": official.keys}} if official.keys else {}
    _write(out, official.config, official.state, official.carried, description)
    return Report.of(official, fitted)


def export_official(folder: str | Path, out: str | Path) -> None:
    """Writes a folder as one PyTorch file that the released program loads.

    An imported folder gives back the keys, values, dtypes and wrapper of its file. Any other is written under `model`,
    with the index tables that the released program expects.
    """
    description, state = _read(folder)
    carried_path = Path(folder) / _CARRIED
    carried = load_file(carried_path) if carried_path.is_file() else {}
    wrapper, keys, more = "model", None, {}
    if official := description.get("official"):
        wrapper, keys = official["wrapper"], official["keys"]
    else:
        config = model_from_dict(description["config"])
        carried = index_buffers(config) | carried
        # what no shape shows; the released program ignores it
        more = {OURS: {"num_heads": config.num_heads, "bias_text_len": config.bias_text_len}}
    if description["config"].get("init_logit_bias") is not None:
        raise UserError(
            f"The model in {folder} was trained with the sigmoid contrast, whose bias has no name in the released form."
        )
    tensors = to_official(state) | carried
    if keys is not None:
        tensors = {key: tensors[key.removeprefix(MODULE)] for key in keys}
    partial = Path(f"{out}.partial")
    torch.save({wrapper: tensors} | more if wrapper else tensors, partial)
    partial.replace(out)


def save_model(model: VLMo, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes weights and configuration into `folder`, which it creates; `load_model` reads it.

    `state` replaces the model's own weights, for example if those are sharded over workers.
    """
    _write(folder, model.config, dict(model.state_dict() if state is None else state), {}, {})


def load_model(
    path: str | Path,
    *,
    image_size: int | None = None,
    max_text_len: int | None = None,
    heads: tuple[str, ...] | None = None,
    num_heads: int | None = None,
    bias_text_len: int | None = None,
    allow_missing: bool = False,
    seed: int = 0,
) -> VLMo:
    """The model in one of our folders or in a released .safetensors file, in float32, on the CPU.

    `image_size`, `max_text_len` and `heads` change the model; positions are resampled. `num_heads` and `bias_text_len`
    are for released files that do not imply them. If the file lacks parameters, raises UserError, or with
    `allow_missing` initialises them from `seed`.
    """
    if Path(path).is_dir():
        description, state = _read(path)
        source = model_from_dict(description["config"])
    elif Path(path).is_file() and Path(path).suffix != ".safetensors":
        raise UserError(f"{path} is not read directly, as it is a pickle; convert it: vlmo import {path} OUT")
    else:
        official = translate(
            read_tensors(path), num_heads=num_heads, bias_text_len=bias_text_len, max_text_len=max_text_len
        )
        source, state = official.config, official.state
    asked = {"image_size": image_size, "max_text_len": max_text_len, "heads": heads}
    config = dataclasses.replace(source, **{name: value for name, value in asked.items() if value is not None})
    fitted = fit_state(state, source, config)
    if fitted.missing and not allow_missing:
        raise UserError(
            f"{path} lacks {len(fitted.missing)} parameters of the model: {shorten(fitted.missing)}. "
            "Pass allow_missing=True to start them at random."
        )
    if fitted.dropped and heads is None:
        raise UserError(f"{path} has weights that its model has no place for: {shorten(fitted.dropped)}.")
    model = VLMo(config)
    if fitted.missing:
        init_weights(model, seed)
    model.load_state_dict(fitted.state, strict=False)
    return model


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError, which names the first of them, if weights from `path` are NaN or infinite."""
    damaged = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if damaged:
        raise UserError(
            f"{path} has NaN or infinite values in {len(damaged)} of its tensors: {shorten(damaged)}. "
            "Take an earlier checkpoint, or fetch the file again."
        )


def _write(
    folder: str | Path, config: ModelConfig, state: dict[str, Tensor], carried: dict[str, Tensor], more: dict
) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # written last: a folder without it is not a model
    (folder / _CARRIED).unlink(missing_ok=True)
    save_file(_separate(state), folder / WEIGHTS)
    if carried:
        save_file(_separate(carried), folder / _CARRIED)
    description = described(config) | more
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses views and tensors that share memory
    plain = torch.contiguous_format
    return {name: value.detach().cpu().clone(memory_format=plain) for name, value in tensors.items()}


def _read(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no {DESCRIPTION}.")
    description = json.loads(path.read_text())
    if description.get("version") != VERSION:
        raise UserError(f"{path} has version {description.get('version')}, this program reads {VERSION}.")
    return description, dict(read_tensors(Path(folder) / WEIGHTS))
