"""Sweeps: Ray Tune draws settings and stops what is behind; every trial is an ordinary run.

The sweep's own record (`launch/sweep.py`) is the only truth. Tune's state is scratch and never restored: a sweep that
goes on is a new `Tuner`, to which the trials of the record are handed again in their order. Those that have ended
answer from what their runs measured, so searcher and scheduler know what they knew, and nothing pickled is read.

Tune ends what it stops by a kill. Here a trial that is stopped is asked to save by the mark in its run, and its actor
begins the next trial only when that run has ended and given back its workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console, Group

from vlmo_ray.config import Config, check
from vlmo_ray.data.mix import load_data
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.fit import absolute, check_evaluation
from vlmo_ray.launch.ray_private import infeasible_groups
from vlmo_ray.launch.resources import living_nodes, share
from vlmo_ray.launch.space import Space, grid, parse_space
from vlmo_ray.launch.stop import STOP
from vlmo_ray.launch.sweep import LEAVING, Asked, Sweep
from vlmo_ray.launch.sweep import Trial as Entry
from vlmo_ray.launch.trackers import check_trackers
from vlmo_ray.launch.trial import LOOK_S, Job, TrialActor
from vlmo_ray.progress import bar, drawn
from vlmo_ray.runs.events import console, show, shows_json
from vlmo_ray.runs.lease import held, lease
from vlmo_ray.session import ray_session

_REDUCTION = 3  # one trial in so many goes on at each rung of the halving
_SAVE_S = 600.0  # a stopped run has to save and end


class _Draws(OptunaSearch):
    """The trials of the record first; then new ones, each noted before it begins."""

    def __init__(self, sweep: Sweep, space: Space, count: int):
        super().__init__(space=self._draw, metric="metric", mode=sweep.asked.mode)
        self._sweep, self._fields, self._count, self._drawn = sweep, space, count, 0

    def _draw(self, trial: optuna.Trial) -> None:
        for path, values in self._fields.items():
            values.draw(trial, path)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        sweep, number = self._sweep, self._drawn
        if sweep.leaving or number >= self._count:
            return Searcher.FINISHED  # pyright: ignore[reportReturnType]  # a str, as Tune documents
        self._drawn += 1
        study, everything = self._ot_study, grid(self._fields)
        assert study is not None
        if number < len(sweep.trials):
            study.enqueue_trial(sweep.trials[number].params)
        elif everything:
            study.enqueue_trial(everything[number])
        # a sampler with a fixed seed would draw the same again after a resume
        seed = random.Random(f"{sweep.asked.seed}-{number}").getrandbits(31)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)
        super().suggest(trial_id)
        params = self._ot_trials[trial_id].params
        entry = sweep.trials[number] if number < len(sweep.trials) else sweep.draw(params)
        return {"number": number, "entry": dataclasses.asdict(entry)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        failed = error or (result or {}).get("ended") == "failed"
        super().on_trial_complete(trial_id, None if failed else result, failed)


class _Watch(ray_tune.Callback):
    """Keeps the record, shows the table, and asks a run that is stopped to save and end."""

    def __init__(self, sweep: Sweep):
        self._sweep = sweep
        self._saving: list[Store] = []  # runs that were asked to save and end

    def on_trial_result(self, iteration, trials, trial, result, **_) -> None:
        entry = self._sweep.trials[trial.config["number"]]
        if entry.state == "running" and "metric" in result:
            entry.step, entry.metric = result["step"], result["metric"]
            sentence = f"trial {entry.name[:3]}: step {entry.step}  metric {entry.metric:.4g}"
            show("trial", sentence, trial=entry.name, step=entry.step, metric=entry.metric, params=entry.params)

    def on_trial_complete(self, iteration, trials, trial, **_) -> None:
        entry, last = self._sweep.trials[trial.config["number"]], trial.last_result
        if entry.state == "running":
            entry.state, entry.error = last.get("ended", "pruned"), last.get("error", "")
            if entry.state == "pruned" and held(run := self._run(entry)):
                run.write(STOP, b"")
                self._saving.append(run)
            self._sweep.save()
            if not self._sweep.leaving:
                _show(self._sweep)
            if entry.error:
                show("trial_failed", f"trial {entry.name[:3]} failed: {entry.error}", trial=entry.name)
        if all(other.is_finished() for other in trials if other is not trial):
            until = time.monotonic() + _SAVE_S  # Tune now ends its actors within seconds, also those that are saving
            while any(map(held, self._saving)) and time.monotonic() < until:
                time.sleep(LOOK_S)

    def on_trial_error(self, iteration, trials, trial, **_) -> None:
        """Its actor was lost more often than Tune starts it again."""
        entry = self._sweep.trials[trial.config["number"]]
        entry.state, entry.error = "failed", "the process that followed the run was lost again and again"
        self._sweep.save()

    def _run(self, entry: Entry) -> Store:
        return Store(f"{self._sweep.store.uri}/{entry.name}")


def tune(
    config: Config,
    data: str,
    storage: str,
    space: Sequence[str] = (),
    *,
    name: str = "",
    eval_data: str = "",
    settings: Sequence[str] = (),
    trials: int = 16,
    at_once: int = 1,
    metric: str = "",
    mode: Literal["", "min", "max"] = "",
    prune: bool = True,
    seed: int = 0,
) -> Sweep:
    """Searches `space` with runs of `config`; returns the sweep, `storage`/`name` (default: the recipe's and "-sweep").

    A sweep of that name that is already there goes on: trials that have ended are not repeated, the others continue
    from their checkpoints, and more are drawn if `trials` is larger now.

    Args:
        space: as `parse_space` takes it; default: what the recipe declares in `search`.
        settings: what was changed of the recipe to get `config`, for the record.
        eval_data: what is evaluated every `evaluate_every` steps, by default nine times a trial.
        trials: how many; a space of choices alone is tried in order, each combination once.
        at_once: how many run at the same time; each needs room for `cluster.min_workers`.
        metric: of the evaluation on `eval_data` (default: its first one), or of training (default: loss).
        mode: what is better; default: "min" for `loss`, "max" for an accuracy and an evaluation's first metric.
        prune: stop trials that are behind (ASHA, Li et al. 2020): at every rung the best third goes on.
    """
    check(config)
    config, data, eval_data = absolute(config, data, eval_data)
    parsed = parse_space(config, space or config.search)
    if trials < 1 or at_once < 1:
        raise UserError(f"trials={trials} and at_once={at_once} must be at least 1")
    sources = load_data(data, config.data.weights)
    if eval_data and not config.evaluate_every:
        config = check(dataclasses.replace(config, evaluate_every=max(1, config.total_steps // 9)))
    check_evaluation(config, eval_data)
    check_trackers(config.trackers)
    if (every := config.evaluate_every or config.log_every) > config.total_steps:
        what = "evaluate_every" if eval_data else "log_every"
        raise UserError(f"{what}={every} is more than the {config.total_steps} steps of a trial: it is never measured")
    metric = metric or ("" if eval_data else "loss")
    uri = f"{storage.rstrip('/')}/{name or f'{config.name}-sweep'}"
    direction = mode or Sweep.mode(uri, metric) or _direction(metric)
    given = [f"{path}={values}" for path, _, values in (text.partition("=") for text in space or config.search)]
    open_store(storage, create=True)
    store = open_store(uri, create=True, retry_timeout_s=config.data.retry_timeout_s)
    asked = Asked(config.name, list(settings), given, sources.fingerprint, eval_data, metric, direction, prune, seed)
    if everything := grid(parsed):
        trials = min(trials, len(everything))
    sweep = Sweep(store, asked)
    style = console("json" if config.log_json else "text")
    with style, lease(store, lambda reason: sweep.lose(reason)), ray_session(dashboard=True):
        sweep = Sweep.open(store, asked)
        config = _fitting(config, at_once)
        with _leaving(sweep), tempfile.TemporaryDirectory(prefix="vlmo-tune-") as scratch:
            block = _block(sweep, trials, config.total_steps)
            try:
                with nullcontext() if config.log_json else drawn(block):
                    _search(sweep, parsed, Job(config, data, eval_data, store, metric, at_once), trials, scratch)
            except Exception as error:  # Tune wraps what `Sweep.save` raises
                if sweep.lost:
                    raise UserError(sweep.lost) from error
                raise
        if sweep.lost:
            raise UserError(sweep.lost)
        if sweep.leaving:
            raise UserError(f"the sweep {store.uri} saved and ended on request; the same command goes on from here")
        sweep.save()
        if any(trial.metric is not None for trial in sweep.trials):
            store.write("sweep.png", sweep.picture())
        _show(sweep)
    return sweep


def _direction(metric: str) -> Literal["min", "max"]:
    """What is better of a metric, where its name says it; "" is the first one of an evaluation."""
    if metric.endswith("loss"):
        return "min"
    if not metric or "accuracy" in metric:
        return "max"
    raise UserError(f"say whether a lower or a higher {metric!r} is better: --mode min or --mode max")


def _show(sweep: Sweep) -> None:
    if shows_json():
        show("sweep", f"{len(sweep.trials)} trials", trials=[dataclasses.asdict(trial) for trial in sweep.trials])
    else:
        console = Console()
        with console.capture() as table:
            console.print(sweep.table())
        print(table.get(), end="", flush=True)  # by stdout's present owner, which may be drawing


def _block(sweep: Sweep, trials: int, steps: int) -> Callable[[], Group]:
    """Draws what is done, running and best by now."""
    began, ended = time.monotonic(), lambda: sum(trial.state != "running" for trial in sweep.trials)
    before = ended()

    def look() -> Group:
        done, best = ended(), sweep.best
        left = (time.monotonic() - began) / (done - before) * (trials - done) if done > before else math.nan
        lines = [
            f"trial {trial.name[:3]}: step {trial.step:,}/{steps:,}"
            + ("" if trial.metric is None else f"  metric {trial.metric:.4g}")
            for trial in list(sweep.trials)
            if trial.state == "running"
        ]
        lines += [f"best so far: trial {best.name[:3]}  metric {best.metric:.4g}"] if best else []
        return Group(bar("trials", done, trials, left), *lines)

    return look


def _fitting(config: Config, at_once: int) -> Config:
    """`config` for trials of which `at_once` have room. Raises UserError if they have none."""
    cluster, nodes = config.cluster, living_nodes()
    if infeasible_groups() is not None:
        return config  # the autoscaler adds nodes
    try:
        each = share(cluster, nodes, parts=at_once)
    except UserError as error:
        raise UserError(f"{at_once} trials at once have no room: {error}") from error
    most = max(cluster.min_workers, min(cluster.max_workers, each.room // at_once))
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, max_workers=most))


def _search(sweep: Sweep, space: Space, job: Job, trials: int, scratch: str) -> None:
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `_leaving` lets the runs save first
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no metric
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    total = job.config.total_steps
    every = job.config.evaluate_every if job.eval_data else job.config.log_every
    first = max(every, total // _REDUCTION**2)
    halving = ASHAScheduler(
        time_attr="step", metric="metric", mode=sweep.asked.mode, max_t=total + 1, grace_period=first,
        reduction_factor=_REDUCTION,
    )  # fmt: skip
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(TrialActor, job=job),
        # on the head node, which no autoscaler takes away; the workers have their own resources
        ray_tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}]),
    )
    ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=job.at_once,
            reuse_actors=True,  # the next trial waits until the run before has ended
            search_alg=_Draws(sweep, space, trials),
            scheduler=halving if sweep.asked.pruning and first < total else FIFOScheduler(),
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=scratch,
            callbacks=[_Watch(sweep)],
            failure_config=ray_tune.FailureConfig(max_failures=3),  # of the processes that follow runs
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


@contextmanager
def _leaving(sweep: Sweep) -> Iterator[None]:
    """Inside the block a first SIGTERM or SIGINT lets all runs save and end; a second one ends this process."""
    over = threading.Event()

    def leave() -> None:
        sweep.store.write(LEAVING, b"")
        while not over.wait(LOOK_S):  # again: a run that is starting removes the mark of an earlier stop
            for entry in list(sweep.trials):
                run = Store(f"{sweep.store.uri}/{entry.name}")
                if entry.state == "running" and held(run):
                    run.write(STOP, b"")

    def ask(number: int, _) -> None:
        restore()
        name = signal.Signals(number).name
        show("stop", f"{name}: all trials save and end; a second one ends them at once", signal=name)
        sweep.leaving = True
        threading.Thread(target=leave, name="leave", daemon=True).start()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        over.set()
        restore()
