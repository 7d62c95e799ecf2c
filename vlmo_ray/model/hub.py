"""A model as a folder that `huggingface_hub` knows: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import model_from_dict, to_dict

CONFIG, WEIGHTS, DESCRIPTION = "config.json", "model.safetensors", "model.json"
VERSION = 1


def described(config: ModelConfig) -> dict:
    """What `config.json` and `model.json` say."""
    return {"format": "vlmo_ray model", "version": VERSION, "config": to_dict(config)}


def write(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Weights and configuration into a folder that is there; `model.json`, which our own folders have, comes last."""
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)
    for name in (CONFIG, DESCRIPTION):
        (folder / name).write_text(json.dumps(described(config), indent=1) + "\n")


def read(place: str, **download) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(configuration, weights) of a folder, or of a repository of a hub, for which `download` holds what
    `hf_hub_download` takes. Raises UserError if there is no model of ours."""
    files = {}
    for name in (CONFIG, WEIGHTS):
        if Path(place).is_dir():
            files[name] = Path(place) / name
            if not files[name].is_file():
                raise UserError(f"{place} holds no model: it has no {name}")
            continue
        try:
            files[name] = Path(hf_hub_download(place, name, **download))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{place} is neither a folder nor a model of the hub that can be read: {reason}") from error
    told = json.loads(files[CONFIG].read_text())
    if told.get("format") != "vlmo_ray model" or told.get("version") != VERSION:
        raise UserError(f"{files[CONFIG]} is not of a model of this program (version {VERSION})")
    try:
        return model_from_dict(told["config"]), load_file(files[WEIGHTS])
    except SafetensorError as error:
        raise UserError(f"{files[WEIGHTS]} cannot be read, it may be cut short: {error}") from error
