"""Checkpoints that any number of workers can read: `torch.distributed.checkpoint` plus `train_state.json`.

A checkpoint folder is written locally by all workers, then handed to whoever commits it as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

from vlmo_ray.errors import UserError
from vlmo_ray.train.state import TrainState

_STATE = "train_state.json"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Writes this worker's part into `folder`, which may differ per worker; their union is the checkpoint."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save(
        {"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=not dist.is_initialized()
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / _STATE).write_text(json.dumps(state.state_dict(), indent=1))


def read_state(folder: Path) -> TrainState:
    """The `TrainState` of a checkpoint, without its weights."""
    path = folder / _STATE
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {_STATE}")
    return TrainState.load_state_dict(json.loads(path.read_text()))


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
