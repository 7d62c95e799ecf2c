"""The process that starts the run of a trial, follows it, and tells Ray Tune what it measured; one run at a time."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Collection
from typing import Any

from ray import tune as ray_tune

from vlmo_ray.config import Config
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.fit import Stopped, fit
from vlmo_ray.launch.space import settings_of
from vlmo_ray.launch.sweep import LEAVING
from vlmo_ray.launch.sweep import Trial as Entry
from vlmo_ray.overrides import override
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.metrics import read_metrics

LOOK_S = 1.0  # between two looks at a run


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same in all trials."""

    config: Config
    data: str
    eval_data: str
    sweep: Store
    metric: str
    at_once: int


class TrialActor(ray_tune.Trainable):
    """Starts and follows one run at a time; a step of Tune's is one measurement of it."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        assert job is not None
        self._job, self._thread = job, None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._entry = Entry(**new_config["entry"])
        self._run = open_store(f"{self._job.sweep.uri}/{self._entry.name}", create=True)
        self._stop, self._outcome = threading.Event(), None
        self._last: dict[str, Any] = {}  # the newest measurement that Tune was told
        return True

    def step(self) -> dict[str, Any]:
        """The next measurement; the last one, with "done", only when the run has ended."""
        entry, total = self._entry, self._job.config.total_steps
        while True:
            over = entry.state != "running" or (self._thread is not None and not self._thread.is_alive())
            rows = [row for row in self._measured() if over or row["step"] < total]
            if rows:
                self._last = rows[0]
            if over and len(rows) < 2:
                return self._last | self._end()
            if rows:
                return dict(self._last)
            if self._thread is None:
                if self._job.sweep.exists(LEAVING):
                    return self._last | {"ended": "running", "done": True}
                self._thread = threading.Thread(target=self._fit, name=entry.name, daemon=True)
                self._thread.start()
            time.sleep(LOOK_S)

    def _end(self) -> dict[str, Any]:
        """How the run ended."""
        state, error = self._entry.state, self._entry.error
        if state == "running" and not isinstance(self._outcome, Stopped):  # which saved; the same sweep goes on
            if self._outcome is not None:
                state, error = "failed", str(self._outcome) or type(self._outcome).__name__
            elif not self._last:
                state, error = "failed", f"the run measured no {self._job.metric or 'metric'}"
            else:
                state = "finished"
        return {"ended": state, "error": error, "done": True}

    def _measured(self) -> list[dict[str, Any]]:
        """Step and metric of the measurements that Tune was not told yet, in the order of steps."""
        job, told = self._job, self._last.get("step", 0)
        found: list[tuple[int, float]] = []
        if job.eval_data:
            for step, result in read_evaluations(self._run, after=told):
                if result.data == job.eval_data:
                    if not result.scores:
                        self._ends(f"{job.eval_data} has no truth to score against; name other --eval-data")
                        break
                    name = job.metric or next(iter(result.scores))
                    if not self._known(name, result.scores):
                        break
                    found.append((step, result[name]))
        else:
            rows, every = read_metrics(self._run)[0], job.config.log_every
            for end in range(every, len(rows) + 1, every):
                if not self._known(job.metric, rows[0]):
                    break
                counted = [row[job.metric] for row in rows[end - every : end] if not row.get("skipped")]
                if end > told and counted:
                    found.append((end, sum(counted) / len(counted)))
        if strange := [step for step, value in found if not math.isfinite(value)]:
            self._ends(f"the {job.metric or 'metric'} is not finite at step {strange[0]}")
            found = [(step, value) for step, value in found if step < strange[0]]
        most = self._entry.step if self._entry.state == "pruned" else job.config.total_steps
        return [{"step": step, "metric": value} for step, value in found if step <= most]

    def _known(self, name: str, metrics: Collection[str]) -> bool:
        """Whether there is a metric of that name; if not, the run ends as failed."""
        if name in metrics:
            return True
        self._ends(f"there is no metric {name!r}; known: {', '.join(metrics)}")
        return False

    def _ends(self, why: str) -> None:
        self._outcome = UserError(why)
        self._stop.set()

    def _fit(self) -> None:
        job = self._job
        try:
            config = override(job.config, settings_of(self._entry.params))
            fit(
                config,
                job.data,
                job.sweep.uri,
                self._entry.name,
                eval_data=job.eval_data,
                stop=self._stop,
                parts=job.at_once,
            )
        except BaseException as error:
            self._outcome = self._outcome or error

    def cleanup(self) -> None:
        """Waits until the run has saved and ended."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def save_checkpoint(self, checkpoint_dir: str) -> dict:
        return {}  # Tune asks for one; runs keep their own

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass
