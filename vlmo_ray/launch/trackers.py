"""Experiment trackers: MLflow, Weights & Biases and trackio, each behind an extra of its name.

They run in the driver and follow what the run stores, so they cost training nothing, and a run that was interrupted
goes on in the tracker where it was. Where a tracker keeps its data is for its own environment variables to say, for
example `MLFLOW_TRACKING_URI`, `WANDB_MODE` or `TRACKIO_DIR`.
"""

from __future__ import annotations

import importlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from vlmo_ray.errors import UserError

State = Literal["finished", "stopped", "failed"]
Rows = Sequence[tuple[int, Mapping[str, float]]]  # (step, metrics)


class Tracker(Protocol):
    """One run in a tracker. A class of this kind in `TRACKERS` is all that another tracker takes."""

    def begin(self, id: str, name: str, project: str, settings: Mapping[str, Any]) -> str:
        """Opens the run `id` of before, or a new one if it is ""; returns its id. `settings` are the config, flat."""
        ...

    def log(self, rows: Rows) -> None:
        """Steps only grow, but after a crash some may come again."""
        ...

    def end(self, state: State) -> None:
        """Closes the run; a later `begin` may open it again."""
        ...


class Mlflow:
    """`MLFLOW_EXPERIMENT_NAME` names the experiment; default: the recipe."""

    _METRICS, _PARAMS = 1000, 100  # the most that a server takes at once

    def begin(self, id: str, name: str, project: str, settings: Mapping[str, Any]) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if id:
            self._client.update_run(id, "RUNNING")
        else:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            id = self._client.create_run(experiment, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            for first in range(0, len(params), self._PARAMS):
                self._client.log_batch(id, params=params[first : first + self._PARAMS])
        self._id = id
        return id

    def log(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, values in rows for key, value in values.items()]
        for first in range(0, len(metrics), self._METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + self._METRICS])

    def end(self, state: State) -> None:
        self._client.set_terminated(self._id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state])


class Wandb:
    """`WANDB_PROJECT` names the project; default: the recipe."""

    def begin(self, id: str, name: str, project: str, settings: Mapping[str, Any]) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", project),
            id=id or uuid.uuid4().hex[:8],
            name=name,
            config=dict(settings),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        return self._run.id

    def log(self, rows: Rows) -> None:
        for step, values in rows:
            self._run.log(dict(values), step=step)

    def end(self, state: State) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


class Trackio:
    """`TRACKIO_PROJECT` names the project; default: the recipe."""

    def begin(self, id: str, name: str, project: str, settings: Mapping[str, Any]) -> str:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", project)
        self._run = trackio.init(project=project, name=name, config=dict(settings), resume="allow", embed=False)
        return name

    def log(self, rows: Rows) -> None:
        for step, values in rows:
            self._run.log(dict(values), step=step)

    def end(self, state: State) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"mlflow": Mlflow, "trackio": Trackio, "wandb": Wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for one that is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: there is no {name!r}; known: {', '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"trackers: {name} is not installed ({error}): pip install 'vlmo-ray[{name}]'") from error
