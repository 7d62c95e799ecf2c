"""Loads models from a run, a checkpoint or an imported folder; writes the final weights of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from vlmo_ray.config import Config
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.data.store import Store, open_store, store_and_name
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.overrides import from_dict, to_dict
from vlmo_ray.progress import tracked
from vlmo_ray.runs import checkpoint
from vlmo_ray.runs.checkpoint import STATE
from vlmo_ray.runs.checkpoints import Checkpoints, name_of
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.runs.state import TrainState
from vlmo_ray.tasks import build_task
from vlmo_ray.weights import folder as folders

_MODEL = "model"  # the folder of final weights
_SOURCE = f"{_MODEL}/source"  # names the checkpoint that they come from
_TASK = "task.json"  # config and schema of the run: in the run, and beside its final weights
_OWN = "task.safetensors"  # weights of the task that are not the model's
_PREFIX = "task."
_PIECE = 64 << 20  # bytes of a file that are fetched at once


@dataclass(frozen=True)
class Loaded:
    """A model, and what is known about the task that it was trained for."""

    model: VLMo
    config: Config | None = None
    schema: Schema | None = None
    own: dict[str, Tensor] = field(default_factory=dict)  # the task's own weights by stored name
    step: int | None = None  # of the run's checkpoint that the weights are from, where it is known

    @property
    def heads(self) -> dict[str, Tensor]:
        """The task's own weights by the names that they have in it."""
        return {name.removeprefix(_PREFIX): tensor for name, tensor in self.own.items()}

    def fill(self, task: nn.Module) -> None:
        """Loads the task's own weights into `task`, which was built around `model`."""
        task.load_state_dict(task.state_dict() | self.heads)


def describe(run: Store, config: Config, schema: Schema, folder: str = "") -> None:
    """Writes the config of the run, and the schema of its data set."""
    content = {"config": to_dict(config), "schema": schema.to_json()}
    run.write(f"{folder}{_TASK}", json.dumps(content, indent=1).encode())


def described(run: Store) -> tuple[Config, Schema | None] | None:
    """The config of a run, and the schema of its data where it is known; None if the store holds no run. Raises
    UserError if what it holds cannot be read."""
    if run.exists("model.json"):
        return None  # weights, beside which a run describes itself too
    if not run.exists(_TASK):
        newest = Checkpoints(run).newest()  # runs of the first version have no more
        return (from_dict(newest.config), None) if newest else None
    try:
        content = json.loads(run.read(_TASK))
        return from_dict(content["config"]), Schema.from_json(content["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.address(_TASK)} is not of a run ({type(error).__name__}: {error})") from error


def publish(run: Store, model: VLMo, weights: dict[str, Tensor], config: Config, schema: Schema) -> None:
    """Writes `weights` (by stored name), which are those of the newest checkpoint, as the final ones of the run.

    `model.json` is written after all weights, so a partial upload cannot be loaded. The name of the checkpoint is last.
    """
    own = {name: tensor.contiguous() for name, tensor in weights.items() if name.startswith(_PREFIX)}
    if own:
        run.write(f"{_MODEL}/{_OWN}", save_tensors(own))
    describe(run, config, schema, f"{_MODEL}/")
    with tempfile.TemporaryDirectory(prefix="vlmo-model-") as folder:
        folders.save_model(model, folder, {name: t for name, t in weights.items() if name not in own})
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".json"):
            run.upload(file, f"{_MODEL}/{file.name}")
    if newest := Checkpoints(run).newest():
        run.write(_SOURCE, _address(newest))


def published(run: Store, state: TrainState) -> bool:
    """Whether the final weights of the run come from the checkpoint with this state."""
    return run.exists(_SOURCE) and run.read(_SOURCE) == _address(state)


def settled(path: str) -> str:
    """Where the weights at `path` stay the same: of a run that still trains, its newest checkpoint."""
    if not path or not (path.startswith("s3://") or Path(path).is_dir()):
        return path
    store = Store(path)
    if store.exists("model.json") or (newest := Checkpoints(store).newest()) is None:
        return path
    return path if _is_final(store, newest) else store.address(name_of(newest.step))


def _is_final(run: Store, newest: TrainState) -> bool:
    """Whether the run's final weights are those of its newest checkpoint; runs of old versions do not say."""
    return run.exists(f"{_MODEL}/model.json") and (published(run, newest) or not run.exists(_SOURCE))


def _address(state: TrainState) -> bytes:
    return f"step {state.step} by {state.attempt}\n".encode()


def load(path: str | Path, **options) -> VLMo:
    """The model at `path`, in float32, on the CPU.

    `path` is a run, a checkpoint of one (RUN/checkpoint-00000400), a folder that `vlmo import` wrote, or a released
    .safetensors file. A run gives its final weights, or those of its newest checkpoint if it has not ended; it may be
    `s3://bucket/prefix`. `options` are those of
    `weights.folder.load_model`.
    """
    with _model_folder(str(path)) as local:
        model = folders.load_model(local, **options)
    folders.check_finite(model.state_dict(), path)
    return model


def load_all(path: str | Path, **options) -> Loaded:
    """The model at `path`, as for `load`, with what is known about its task."""
    with _model_folder(str(path)) as local:
        model = folders.load_model(local, **options)
        folders.check_finite(model.state_dict(), path)
        described = Path(local) / _TASK
        if not described.is_file():
            return Loaded(model)
        content = json.loads(described.read_text())
        own = Path(local) / _OWN
        tensors = load_tensors(own.read_bytes()) if own.is_file() else {}
        folders.check_finite(tensors, path)
        source = Path(local) / Path(_SOURCE).name
        step = int(source.read_text().split()[1]) if source.is_file() else None
        return Loaded(model, from_dict(content["config"]), Schema.from_json(content["schema"]), tensors, step)


def export(path: str | Path, out: str | Path) -> None:
    """Writes the model at `path` (as for `load`) under the official keys into the file `out`, which may be `s3://`."""
    target, name = store_and_name(str(out))
    if not Path(name).suffix:
        raise UserError(f"{out} does not name a file; write for example {out}/model.pt")
    with _model_folder(str(path)) as local, scratch() as folder:
        folders.export_official(local, folder / name)
        target.upload(folder / name, name)


def import_official(official: str, out: str) -> folders.Report:
    """Converts a released file to a folder `out`, which may be `s3://`; says what became of every key."""
    with scratch() as folder:
        report = folders.import_official(official, folder / _MODEL)
        target = open_store(out, create=True)
        for file in sorted((folder / _MODEL).iterdir(), key=lambda file: file.suffix == ".json"):
            target.upload(file, file.name)  # model.json comes last: a folder without it is not a model
    return report


@contextmanager
def _model_folder(path: str) -> Iterator[str]:
    """A local folder or file that `weights.folder` reads. A run is converted to one."""
    if not path.startswith("s3://") and not Path(path).is_dir():
        yield path  # a released .safetensors file; `weights.folder` raises if there is none
        return
    store = open_store(path)
    parent, _, name = path.rstrip("/").rpartition("/")
    if store.exists(STATE):
        with tempfile.TemporaryDirectory(prefix="vlmo-model-") as folder:
            Checkpoints(run := open_store(parent or ".")).fetch_named(name, Path(folder) / name)
            _from_checkpoint(run, Path(folder) / name, Path(folder))
            yield folder
        return
    if store.exists("model.json") and not store.is_s3:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vlmo-model-") as folder:
        target = Path(folder)
        inner = next((p for p in ("", f"{_MODEL}/") if store.exists(f"{p}model.json")), None)
        # a run that was made longer has final weights of before until it ends again
        newest = Checkpoints(store).newest() if inner else None
        if inner is not None and (newest is None or _is_final(store, newest)):
            _fetch(store, inner, target)
        elif Checkpoints(store).fetch_newest(shards := target / "checkpoint"):
            _from_checkpoint(store, shards, target)
        else:
            raise UserError(
                f"{path} holds no model: it has neither a model.json, nor a {_MODEL}/ folder, nor a checkpoint. Name a "
                "run, or a folder that `vlmo import` wrote"
            )
        yield folder


def _fetch(store: Store, prefix: str, target: Path) -> None:
    """The files of one folder of the store, as files in the folder `target`."""
    sizes = {name: size for name, size in store.sizes(prefix).items() if "/" not in name.removeprefix(prefix)}

    def versions() -> list:
        found = store.versions(prefix)
        return [found.get(name) for name in sizes]

    before = versions()
    pieces = [(name, at) for name, size in sizes.items() for at in range(0, size or 1, _PIECE)]
    read = ((name, store.read(name, at, _PIECE)) for name, at in pieces)
    for name, piece in tracked(read, "MB of weights", sum(sizes.values()) / 1e6, lambda one: len(one[1]) / 1e6):
        with (target / Path(name).name).open("ab") as file:
            file.write(piece)
    if versions() != before:
        raise UserError(f"{store.address(prefix)} was written again while it was read; repeat the command")


def _from_checkpoint(store: Store, shards: Path, target: Path) -> None:
    state = checkpoint.read_state(shards)
    config = from_dict(state.config)
    (target / Path(_SOURCE).name).write_bytes(_address(state))
    schema = None
    if store.exists(_TASK):
        described = store.read(_TASK)
        (target / _TASK).write_bytes(described)
        schema = Schema.from_json(json.loads(described)["schema"])
    task = build_task(VLMo(config.model), config, schema or PAIRS)
    checkpoint.load_weights(shards, task)
    weights = checkpoint.weights_of(task)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    if own:
        (target / _OWN).write_bytes(save_tensors(own))
    folders.save_model(task.model, target, {name: t for name, t in weights.items() if name not in own})
