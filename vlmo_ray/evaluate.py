"""Evaluation of any task on Ray: actors turn the rows of a data set into what the score needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from vlmo_ray.config import Config, ModelConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.pipeline import eval_dataset
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.reader import Reader, Sources
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.progress import tracked
from vlmo_ray.runs.evaluations import Result, scored
from vlmo_ray.runs.load import Loaded, load_all
from vlmo_ray.session import actors
from vlmo_ray.tasks import build_evaluation, build_task, kinds
from vlmo_ray.tasks.task import Columns, Evaluation


def _default(config: ModelConfig) -> str:
    """What weights that no run of ours made are measured on: the task that one of their heads is called by."""
    return next((kind for kind in kinds() if kind in config.heads), "retrieval")


@dataclass(frozen=True)
class _Recipe:
    """How an actor builds the evaluation, beside the weights."""

    kind: str
    model: ModelConfig
    data: Schema  # of the data set
    config: Config | None  # of the run that trained the task; None: an evaluation of any model
    schema: Schema | None  # that the run was trained on
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, model: VLMo) -> tuple[Evaluation, torch.nn.Module]:
        """The evaluation, and the module that holds all its weights."""
        if self.config is None or self.schema is None:
            return build_evaluation(self.kind, model, self.data, **self.options), model
        task = build_task(model, self.config, self.schema)
        return task.evaluation(self.data), task


class _Actor:
    """Rows of a chunk -> what the score needs of them."""

    def __init__(self, recipe: _Recipe, weights_ref, on_gpu: bool):
        import ray

        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.evaluation, module = recipe.build(VLMo(recipe.model))
        module.load_state_dict(ray.get(weights_ref))
        module.to(self.device)

    def __call__(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # copies: what Ray hands over is read-only
        batch = Batch.from_numpy({name: np.array(column) for name, column in columns.items()})
        with torch.inference_mode():
            rows = self.evaluation.rows(batch.to(self.device))
        found = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
        return found | {name: columns[name] for name in ("valid", "id", "problem")}


def evaluate(
    weights: VLMo | Loaded | str | Path,
    data: str,
    task: str = "",
    *,
    num_workers: int | None = None,
    device: Literal["auto", "cpu", "gpu"] = "auto",
    **options: Any,
) -> Result:
    """Scores weights on the data set at `data`, by Ray Data batch inference. Ray must be initialised.

    Args:
        weights: a model, or where one is: a run, one of its checkpoints, or an imported folder.
        task: what to measure; default: what the run was trained for. Of imported weights: what their head is for,
            or retrieval.
        num_workers: how many actors work at once (default: one per GPU, or half the CPUs). It changes nothing
            but the time: a batch is a chunk of the data set.
        device: of the actors; auto: GPUs if the cluster has any now. "gpu" asks for them where nodes are added.
        options: of an evaluation that any model can have, such as `subset` of retrieval.

    Raises UserError for a task that the weights were not trained for, and for data that lacks what the task reads.
    """
    import ray

    if isinstance(weights, VLMo):
        weights = Loaded(weights)
    loaded = weights if isinstance(weights, Loaded) else load_all(weights)
    trained = loaded.config.task.kind if loaded.config else ""
    kind = task or trained or _default(loaded.model.config)
    own = kind == trained and loaded.schema is not None and not options
    manifest = load_manifest(data)
    run = (loaded.config, loaded.schema) if own else (None, None)
    recipe = _Recipe(kind, loaded.model.config, manifest.schema, *run, options)
    evaluation, module = recipe.build(loaded.model)
    if own:
        loaded.fill(module)
    sources = Sources((manifest,))
    reader = Reader(sources.places, evaluation.encoder())
    workers, cpus, gpus = actors(num_workers, device)
    state = ray.put({name: tensor.cpu() for name, tensor in module.state_dict().items()})
    rows = eval_dataset(sources, reader).map_batches(
        _Actor,
        fn_constructor_args=(recipe, state, gpus > 0),
        batch_size=None,  # a batch is a chunk, whatever the number of workers
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    try:
        batches = iter(rows.iter_batches(batch_size=None, batch_format="numpy"))
        with closing(cast("Generator[Columns]", batches)) as blocks:  # after an error too, the actors end here
            shown = tracked(blocks, f"evaluating {kind}", manifest.num_rows, lambda block: len(block["id"]))
            measured = scored(evaluation, shown, data)
            label = " ".join([kind, *(f"{name}={value!r}" for name, value in options.items())])
            return measured if own else dataclasses.replace(measured, task=label)
    except UserError:
        raise
    except Exception as error:
        raise user_error(error) or error from None
