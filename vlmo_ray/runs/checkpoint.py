"""One checkpoint in a local folder: `torch.distributed.checkpoint` files plus `train_state.json`.

Written by all workers, read by any number of them, replicated or sharded. `train_state.json` names every file
with its size and checksum, and has its own, so a checkpoint that lacks a file or has a changed one is recognised.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

from vlmo_ray.errors import UserError
from vlmo_ray.runs.state import TrainState

STATE = "train_state.json"

Files = dict[str, tuple[int, int]]  # name -> bytes, CRC-32


class SaveError(UserError):
    """A checkpoint could not be written; raised on all workers, with the first one's reason."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Writes this worker's part into `folder`, which is its own; their union is the checkpoint.

    Every worker calls. Raises SaveError on all of them if one could not write.
    """
    weights, moments = get_state_dict(model, optimizer)
    together = dist.is_initialized()
    problem = ""
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=not together)
    except CheckpointException as error:
        reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
        # of a full disk the libraries say no more than that a file has an unexpected length
        free = shutil.disk_usage(folder.parent).free / 1e6
        problem = f"{reasons} ({free:,.0f} MB are free in {folder.parent}; TMPDIR names another place)"
    files = {} if problem else {file.name: measured(file) for file in folder.iterdir()}
    reports: list[Any] = [(files, problem)]
    if together:
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (files, problem))
    if not together or dist.get_rank() == 0:
        everything = {name: size for part, _ in reports for name, size in part.items()}
        try:
            (folder / STATE).write_text(_sealed(state.state_dict() | {"files": everything}))
        except OSError as error:
            problem = str(error)
    if together:
        dist.all_gather_object(reports, (files, problem))
    if problems := [problem for _, problem in reports if problem] or ([problem] if problem else []):
        raise SaveError(f"the checkpoint of step {state.step} could not be written: {problems[0]}")


def measured(file: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _sealed(content: dict[str, Any]) -> str:
    content = json.loads(json.dumps(content))  # as it will be read
    return json.dumps({"crc32": _crc(content)} | content, indent=1)


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def parse_state(text: str | bytes) -> tuple[TrainState, Files]:
    """The contents of a `train_state.json`; ValueError, KeyError or TypeError if it is not as it was written."""
    raw = json.loads(text)
    if raw.pop("crc32") != _crc(raw):
        raise ValueError("its checksum does not match")
    files = {name: (size, crc) for name, (size, crc) in raw.pop("files").items()}
    return TrainState.load_state_dict(raw), files


def read_state(folder: Path) -> TrainState:
    """The `TrainState` of a checkpoint, without its weights."""
    path = folder / STATE
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {STATE}")
    return parse_state(path.read_text())[0]


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fills model and optimizer in place; written by any number of workers, read by any number."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_state(folder)


def load_weights(folder: Path, model: nn.Module) -> TrainState:
    """Fills the model alone, in a single process; for evaluation and export."""
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(weights)
    return read_state(folder)
