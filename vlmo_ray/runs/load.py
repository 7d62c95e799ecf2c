"""What a run leaves behind: checkpoints, final weights; and models from any place that holds one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vlmo_ray.weights import folder as convert
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.overrides import from_dict
from vlmo_ray.runs import checkpoint
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.state import TrainState

_MODEL = "model"  # the folder of final weights
_SOURCE = f"{_MODEL}/source"  # names the checkpoint that they are those of


def publish_model(model: VLMo, state: dict[str, Tensor], run: Store) -> None:
    """Writes the weights of the run's newest checkpoint as its final ones.

    The description comes after them, so that a half is no model, and last what they are made from.
    """
    with tempfile.TemporaryDirectory(prefix="vlmo-model-") as folder:
        convert.save_model(model, folder, state)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".json"):
            run.write(f"{_MODEL}/{file.name}", file.read_bytes())
    if newest := Checkpoints(run).newest():
        run.write(_SOURCE, _address(newest))


def published(run: Store, state: TrainState) -> bool:
    """Whether the run's final weights are those of its checkpoint of this state."""
    return run.exists(_SOURCE) and run.read(_SOURCE) == _address(state)


def _address(state: TrainState) -> bytes:
    return f"step {state.step} by {state.attempt}\n".encode()


def load(path: str | Path, **options) -> VLMo:
    """The model at `path`, in float32, on the CPU.

    `path` is a run (its final weights, or while it lasts those of its newest checkpoint), a folder that
    `vlmo import` wrote, or a released file. A run may be `s3://bucket/prefix`. `options` are those of
    `convert.load_model`.
    """
    with _model_folder(str(path)) as local:
        return convert.load_model(local, **options)


def export(path: str | Path, out: str | Path) -> None:
    """Writes the model at `path` (as for `load`) under the official keys."""
    with _model_folder(str(path)) as local:
        convert.export_official(local, out)


@contextmanager
def _model_folder(path: str) -> Iterator[str]:
    """A local folder or file that `convert` reads, made from a run if `path` is one."""
    if not path.startswith("s3://") and not Path(path).is_dir():
        yield path  # a released file, or nothing: `convert` says so
        return
    store = open_store(path)
    if store.exists("model.json") and not store.is_s3:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vlmo-model-") as folder:
        target = Path(folder)
        inner = next((p for p in ("", f"{_MODEL}/") if store.exists(f"{p}model.json")), None)
        if inner is not None:
            _download(store, inner, target)
        elif Checkpoints(store).fetch_newest(shards := target / "checkpoint"):
            model = VLMo(from_dict(checkpoint.read_state(shards).config).model)
            checkpoint.load_weights(shards, model)
            convert.save_model(model, target)
        else:
            raise UserError(
                f"{path} holds no model: it has neither a model.json, nor a {_MODEL}/ folder, nor a checkpoint. Name a "
                "run, a folder that `vlmo import` wrote, or a released file"
            )
        yield folder


def _download(store: Store, prefix: str, folder: Path) -> None:
    for name in store.list(prefix):
        if "/" not in name.removeprefix(prefix):
            (folder / Path(name).name).write_bytes(store.read(name))
