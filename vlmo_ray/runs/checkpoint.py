"""One checkpoint in a local folder: `torch.distributed.checkpoint` files and `train_state.json`.

All workers write it; any number of workers can read it, replicated or sharded. `train_state.json` lists every file with
size and checksum, and has a checksum of its own, so a missing or changed file is detected.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from vlmo_ray.errors import UserError
from vlmo_ray.runs.state import TrainState

STATE = "train_state.json"

Files = dict[str, tuple[int, int]]  # name -> bytes, CRC-32


# All that the metadata of a checkpoint of tensors consists of.
_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool", "strided"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
}


class _Unpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint, which PyTorch stores as a pickle, without running what else a pickle may."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _TYPES.get(module_name, ()):
            raise UserError(f"its metadata names {module_name}.{global_name}, which no checkpoint of tensors has")
        return super().find_class(module_name, global_name)


class _Reader(FileSystemReader):
    """Reads only tensors, from files beside the metadata."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            stored = metadata.storage_data.values()
            if not all(_is_name(place.relative_path) for place in stored):
                raise UserError("its metadata names a file outside of the checkpoint")
            # an entry of bytes would be unpickled; those in checkpoints of older versions are of no use
            entries = metadata.state_dict_metadata.items()
            tensors = {name: kind for name, kind in entries if isinstance(kind, TensorStorageMetadata)}
            metadata.state_dict_metadata = tensors
        except (UserError, OSError, pickle.UnpicklingError, AttributeError, EOFError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint in {path.parent} is not read: {error}") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _is_name(name: Any) -> bool:
    """Whether a stored name is one of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None and name.strip(".") != ""


class SaveError(UserError):
    """A checkpoint could not be written. All workers raise it, with the first reason."""


def stored_name(name: str) -> str:
    """The stored name of a task's parameter. Those of the model do not name the task, because they outlive it."""
    return name.removeprefix("model.") if name.startswith("model.") else f"task.{name}"


def weights_of(task: nn.Module) -> dict[str, Tensor]:
    """All weights of a task by stored name; sharded ones stay sharded."""
    return {stored_name(name): tensor for name, tensor in task.state_dict().items()}


def _everything(task: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None) -> dict[str, Any]:
    """The content of a checkpoint. The optimizer's settings are not in it: they come from the config."""
    moments = {
        stored_name(name): dict(optimizer.state[parameter])
        for name, parameter in task.named_parameters()
        if parameter in optimizer.state
    }
    content = {"model": weights_of(task), "optimizer": {"state": moments}}
    if average is not None:
        content["average"] = {stored_name(name): tensor for name, tensor in average.items()}
    return content


def _start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state of AdamW as before its first step, to be filled from a checkpoint."""
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["fused"] else torch.device("cpu")
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def save(
    folder: Path,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    average: dict[str, Tensor] | None = None,
) -> None:
    """Writes this worker's files into `folder`, which is its own; the files of all workers are the checkpoint.

    `average` holds the moving average of the weights by parameter name. Every worker must call this. If one could not
    write, all of them raise SaveError.
    """
    content = _everything(task, optimizer, average)
    together = dist.is_initialized()
    problem = ""
    try:
        # what each worker has to write is the same at every checkpoint: only the first one of a start plans it
        planner = DefaultSavePlanner(enable_plan_caching=True)
        with _quiet():
            state_dict_saver.save(content, checkpoint_id=folder, planner=planner, no_dist=not together)
    except CheckpointException as error:
        reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
        # on a full disk the libraries only report that a file has an unexpected length
        free = shutil.disk_usage(folder.parent).free / 1e6
        problem = f"{reasons} ({free:,.0f} MB are free in {folder.parent}; set TMPDIR to use another disk)"
    files = {} if problem else {file.name: measured(file) for file in folder.iterdir()}
    reports: list[Any] = [(files, problem)]
    if together:
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (files, problem))
    if not together or dist.get_rank() == 0:
        everything = {name: size for written, _ in reports for name, size in written.items()}
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
    content = json.loads(json.dumps(content))  # as it will be read back
    return json.dumps({"crc32": _crc(content)} | content, indent=1)


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def parse_state(text: str | bytes) -> tuple[TrainState, Files]:
    """The contents of a `train_state.json`. Raises ValueError, KeyError or TypeError if it is damaged."""
    raw = json.loads(text)
    if raw.pop("crc32") != _crc(raw):
        raise ValueError("its checksum does not match")
    files = {name: (size, crc) for name, (size, crc) in raw.pop("files").items()}
    state = TrainState.load_state_dict(raw)
    if wrong := [name for name in (*files, *(name for _, name in state.attempts)) if not _is_name(name)]:
        raise ValueError(f"it names {wrong[0]!r}, which is no name of a file")
    return state, files


def read_state(folder: Path) -> TrainState:
    """The `TrainState` of a checkpoint, without its weights."""
    path = folder / STATE
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {STATE}")
    return parse_state(path.read_text())[0]


def load(
    folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
) -> TrainState:
    """Fills weights, optimizer state and average in place, whatever number of workers wrote them.

    A weight that the checkpoint has no moments of was never updated: they start at zero. One of which it has no average
    starts that at its value.
    """
    _start_moments(optimizer)
    names = _Reader(folder).read_metadata().state_dict_metadata
    averages = {name: tensor for name, tensor in (average or {}).items() if f"average.{stored_name(name)}" in names}
    content = _everything(task, optimizer, averages or None)
    state = content["optimizer"]["state"]
    known = {name for name in state if any(f"optimizer.state.{name}.{kind}" in names for kind in state[name])}
    content["optimizer"]["state"] = {name: moments for name, moments in state.items() if name in known}
    _fill(content, folder, no_dist=not dist.is_initialized())
    for name, parameter in task.named_parameters():
        if average is not None and name in average and name not in averages:
            average[name].copy_(parameter.detach())
    return read_state(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns of every checkpoint of a worker alone that it is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _fill(content: dict[str, Any], folder: Path, no_dist: bool) -> None:
    """Fills the tensors of `content` in place. Raises UserError, on all workers, if the checkpoint lacks one."""
    try:
        with _quiet():
            state_dict_loader.load(content, storage_reader=_Reader(folder), no_dist=no_dist)
    except CheckpointException as error:
        reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
        raise UserError(f"the checkpoint in {folder} cannot be loaded: {reasons}") from error


def load_weights(folder: Path, task: nn.Module) -> None:
    """Fills only the weights, in a single process, for evaluation and export: their average if there is one."""
    _fill({"model": weights_of(task)}, folder, no_dist=True)
    if known := _averaged(folder):
        named = ((stored_name(name), parameter.detach()) for name, parameter in task.named_parameters())
        averages = {name: tensor for name, tensor in named if name in known}
        _fill({"average": averages}, folder, no_dist=True)


def _averaged(folder: Path) -> set[str]:
    """Stored names of the weights whose average the checkpoint holds."""
    names = _Reader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix("average.") for name in names if name.startswith("average.")}
