"""From a config to a run on a Ray cluster: the driver starts runs of Ray Train one after another until one is done.

Each of them has a fixed number of workers. When nodes come or go its workers save and return, or it fails, and the
driver starts the next one with as many workers as there is room for then.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmo_ray.config import ClusterConfig, Config, check
from vlmo_ray.data.manifest import check_shards, load_manifest
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.ray_private import infeasible_groups
from vlmo_ray.launch.resources import Claims, Share, living_nodes, room, share
from vlmo_ray.launch.stop import Stop
from vlmo_ray.launch.worker import RESIZE, work
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.lease import lease
from vlmo_ray.runs.load import published
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.session import ray_session
from vlmo_ray.train.build import RunSpec


class Stopped(UserError):
    """The run saved and ended on request."""


def fit(
    config: Config,
    data: str,
    storage: str,
    name: str | None = None,
    accept_changes: bool = False,
    eval_data: str = "",
    stop: threading.Event | None = None,
    parts: int = 1,
) -> Store:
    """Trains `config` on the data set at `data`; returns the run, `storage`/`name` (default: the recipe's).

    A run of that name that is already there goes on from its newest checkpoint; if data or settings have changed, only
    with `accept_changes`. A finished run is returned as it is. `eval_data` names the data set that is evaluated
    every `evaluate_every` steps. When `stop` is set, or at the first signal to this process, the workers save and
    end, which raises `Stopped`. `parts` is the number of runs that share the cluster. Raises UserError for everything
    that the caller can mend, most of it before a worker starts.
    """
    check(config)
    config, data, eval_data = absolute(config, data, eval_data)
    name = name or config.name
    manifest = load_manifest(data)
    check_shards(manifest, open_store(data))
    check_evaluation(config, eval_data)
    open_store(storage, create=True)
    run = open_store(f"{storage.rstrip('/')}/{name}", create=True, retry_timeout_s=config.data.retry_timeout_s)
    asked = Stop(run, stop)
    # Ray sets signal handlers of its own in ray_session
    with lease(run, asked.lose) as token, ray_session(dashboard=True), asked.on_signals():
        state = Checkpoints(run).newest()
        if state is not None:
            changed = state.continue_with(config, manifest.fingerprint, accept_changes)
            if state.step == config.total_steps and published(run, state):
                print(f"run {name!r} is finished already: nothing is left to do", flush=True)
                return run
            print(f"run {name!r} continues from step {state.step} of {config.total_steps}", flush=True)
            if changed:
                print(f"from here on with other settings: {'; '.join(changed)}", flush=True)
        cluster = config.cluster
        autoscaling = infeasible_groups() is not None
        each = share(cluster, living_nodes(), autoscaling, parts)
        rows = schedule_rows(config)
        print(
            f"{config.name}: {config.total_steps} steps, {rows:,} samples ({rows / manifest.num_rows:.2f} epochs of "
            f"{manifest.num_rows:,}); {cluster.min_workers} to {cluster.max_workers} workers with "
            f"{cluster.gpus_per_worker} GPU and {each.cpus:g} CPU each, of that for {each.data_tasks} data "
            f"tasks; room for {each.room}{' now, the cluster adds nodes' if autoscaling else ''}",
            flush=True,
        )
        spec = RunSpec(
            config,
            data,
            run.uri,
            manifest.fingerprint,
            eval_data,
            data_tasks=each.data_tasks,
            accept_changes=accept_changes,
        )
        with scratch() as folder:
            start = functools.partial(_start, functools.partial(work, spec, token), cluster, each, name, folder)
            phases = [(phase.steps, phase.global_batch // config.slice_size) for phase in config.phases]
            outcome = _Driver(cluster, each, autoscaling, run, asked, start, phases).train()
    if outcome is None:
        raise Stopped(
            f"run {name!r} ended on request while it had no workers; the same command goes on from its newest "
            "checkpoint"
        )
    if outcome["stopped"]:
        raise (Stopped if outcome["requested"] else UserError)(f"run {name!r} stopped at {outcome['stopped']}")
    return run


def absolute(config: Config, data: str, eval_data: str) -> tuple[Config, str, str]:
    """The same with absolute addresses: workers have another working directory."""
    init, data, eval_data = (uri and Store(uri).uri for uri in (config.init, data, eval_data))
    return dataclasses.replace(config, init=init), data, eval_data


def check_evaluation(config: Config, eval_data: str) -> None:
    if bool(eval_data) != bool(config.evaluate_every):
        raise UserError(
            f"evaluate_every={config.evaluate_every} and --eval-data={eval_data!r} go together: give both, or neither"
        )
    if eval_data:
        load_manifest(eval_data)


def schedule_rows(config: Config) -> int:
    return sum(phase.steps * phase.global_batch for phase in config.phases)


_SAME_ERROR = 3  # failures with one error, without a new checkpoint in between, after which a run is given up


class _Driver:
    """Keeps a run going: as many workers as have room, started again whenever they end before the run does."""

    def __init__(
        self,
        cluster: ClusterConfig,
        each: Share,
        autoscaling: bool,
        run: Store,
        stop: Stop,
        start: Callable[[int], concurrent.futures.Future],
        phases: Sequence[tuple[int, int]],
    ):
        self._cluster, self._each, self._autoscaling = cluster, each, autoscaling
        self._run, self._stop, self._start = run, stop, start
        self._phases = phases  # (steps, slices of a global batch)
        self._slices: list[int] = []  # of a global batch, in each phase that was not over at the newest checkpoint
        self._claims = Claims(each.cpus, cluster.gpus_per_worker)
        self._leaving: set[str] = set()  # ids of nodes with a notice
        self._problems: list[str] = []  # of the failures since the checkpoint of step `_failed_at`
        self._failed_at = -1

    def train(self) -> dict | None:
        """What `work` returned when the run ended for good; None if asked to end while it had no workers."""
        self._run.delete(RESIZE)
        try:
            while (size := self._wait_for_room()) is not None:
                outcome = self._fit(size)
                if outcome is not None and not outcome["again"]:
                    return outcome
            return None
        finally:
            self._claims.want(0)

    def _fit(self, size: int) -> dict | None:
        """What `work` returned on `size` workers; None if they failed and may be started again."""
        fit = self._start(size)
        resizing = self._watch(fit, size)
        from ray.exceptions import RayActorError
        from ray.train import PreemptionError, TrainingFailedError

        try:
            outcome = fit.result()
        except PreemptionError as error:  # the node was gone before the workers had saved
            self._leaving |= set(error.preemption_info.preempted_node_ids)
            print(f"the workers lost a node before they had saved: {error}", flush=True)
            return None
        except (TrainingFailedError, RayActorError) as error:  # the latter: the controller itself was lost
            if found := first_user_error(error):
                raise found from error
            if not self._may_fail(_recurring(error)):
                raise
            return None
        finally:
            if resizing:
                self._run.delete(RESIZE)
        self._leaving |= set(outcome["leaving"])
        if outcome["again"]:
            print(f"the workers ended at {outcome['stopped']}", flush=True)
        return outcome

    def _may_fail(self, problem: str) -> bool:
        """Counts a failure with the error `problem` ("" for lost workers); whether the run is to be started again.

        A newer checkpoint than at the last failure starts the count anew. An error that came back `_SAME_ERROR` times
        without one will always come back.
        """
        state = Checkpoints(self._run).newest()
        if state is not None and state.step > self._failed_at:
            self._failed_at, self._problems = state.step, []
        self._problems.append(problem)
        allowed, failures = self._cluster.max_failures, len(self._problems)
        if problem and self._problems.count(problem) >= _SAME_ERROR:
            print(f"the workers failed {_SAME_ERROR} times with the same error since the newest checkpoint", flush=True)
            return False
        if 0 <= allowed < failures:
            return False
        print(
            f"the workers failed, {failures} of {allowed if allowed >= 0 else 'any number of'} times that "
            "cluster.max_failures allows without a new checkpoint; starting again",
            flush=True,
        )
        return True

    def _wait_for_room(self) -> int | None:
        """How many workers to start now; None if asked to end before `min_workers` have room."""
        cluster = self._cluster
        began, told, pause = time.monotonic(), 0, 0.05
        self._slices = self._slices_left()
        while True:
            self._stop.check()
            if self._stop.asked:
                return None
            counted = self._counted_room()
            wanted = self._fewest(cluster.max_workers if self._autoscaling else counted)
            self._claims.want(wanted)
            if self._autoscaling:
                self._claims.check(cluster)
            size, counted = min(self._claims.standing(), counted), min(wanted, counted)
            waited = time.monotonic() - began
            # a node that was just lost may still be counted: not every claim has to stand for ever
            if size >= cluster.min_workers and (size == counted or waited > cluster.start_timeout_s):
                break
            if waited // 60 > told:
                told = int(waited // 60)
                print(
                    f"waiting for nodes since {told} min: room for {size} workers, cluster.min_workers is "
                    f"{cluster.min_workers}",
                    flush=True,
                )
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        self._claims.want(0)  # for Ray Train to reserve the same
        return self._fewest(size)

    def _watch(self, fit: concurrent.futures.Future, size: int) -> bool:
        """Returns when `fit` is over; whether its workers were asked to end as there is room for more."""
        cluster, resizing = self._cluster, False
        # by then Ray Train has reserved its workers' resources, or given up
        look = time.monotonic() + cluster.start_timeout_s + cluster.resize_interval_s
        while not concurrent.futures.wait([fit], timeout=1.0).done:
            self._stop.check()
            if resizing or self._stop.asked or size == cluster.max_workers or time.monotonic() < look:
                continue
            look = time.monotonic() + cluster.resize_interval_s
            if more := self._more_room(size):
                with contextlib.suppress(UserError):  # the storage is away: at the next look
                    Store(self._run.uri).write(RESIZE, b"")
                    resizing = True
                    print(f"room for {more} more workers: the {size} workers save and start again", flush=True)
        return resizing

    def _slices_left(self) -> list[int]:
        """The slices of a global batch in each phase that is not over."""
        state = Checkpoints(self._run).newest()
        ends = itertools.accumulate(steps for steps, _ in self._phases)
        return [
            slices for end, (_, slices) in zip(ends, self._phases, strict=True) if end > (state.step if state else 0)
        ]

    def _largest_shares(self, size: int) -> list[int]:
        """In each phase, the slices of the worker with the most: the others wait for it."""
        return [-(-slices // size) for slices in self._slices]

    def _fewest(self, size: int) -> int:
        """The fewest workers, at least `min_workers`, that are as fast as `size`."""
        if size < self._cluster.min_workers:
            return size
        candidates = range(self._cluster.min_workers, size)
        return next((few for few in candidates if self._largest_shares(few) == self._largest_shares(size)), size)

    def _more_room(self, size: int) -> int:
        """How many more than `size` workers have room, at most `max_workers` together; 0 if they save no time."""
        limit = self._fewest(self._cluster.max_workers if self._autoscaling else self._counted_room())
        self._claims.want(max(0, limit - size))
        if limit > size and self._claims.wait(1.0):
            larger = self._fewest(size + self._claims.standing())
            if larger > size:
                return larger - size
        if not self._autoscaling:  # where nodes are added, a claim waits, or holds its node, until they are enough
            self._claims.want(0)
        return 0

    def _counted_room(self) -> int:
        nodes = living_nodes(self._leaving)
        return min(self._cluster.max_workers, room(nodes, self._each.cpus, self._cluster.gpus_per_worker))


def _start(
    work: Callable[[], dict], cluster: ClusterConfig, each: Share, name: str, folder: Path, size: int
) -> concurrent.futures.Future:
    """Starts a run of Ray Train with `size` workers; its result is what `work` returns on the first of them.

    Ray Train's own files go to `folder` on this node: it keeps nothing that a later start could need.
    """
    # How long Ray Train waits for the workers' resources, and how often it looks after them. Ray Train reads the
    # environment, and carries these variables on to its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # its patched `print` would show every line twice
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from vlmo_ray.launch.group import GroupConfig

    trainer = TorchTrainer(
        work,
        torch_config=GroupConfig("nccl" if cluster.gpus_per_worker else "gloo"),  # pyright: ignore[reportArgumentType]  # any BackendConfig will do
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": each.cpus}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    future: concurrent.futures.Future = concurrent.futures.Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit().return_value)
        except BaseException as error:
            future.set_exception(error)

    # Outside the main thread Ray Train leaves Ctrl-C to us. A daemon, so that a second signal can end the process.
    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    return future


def _recurring(error: Exception) -> str:
    """The first worker's own exception without its numbers, to tell whether it comes back; "" for lost workers."""
    from ray.exceptions import RayActorError

    for failure in getattr(error, "worker_failures", {}).values():
        if not isinstance(failure, RayActorError):
            lines = [line for line in str(failure).splitlines() if line.strip()]
            return re.sub(r"\d+", "#", f"{type(failure).__name__}: {lines[-1] if lines else ''}")
    return ""


def first_user_error(error: Exception) -> UserError | None:
    """The `UserError` behind Ray Train's error, of a worker or of its controller; None if there is none."""
    failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    return next(filter(None, map(user_error, failures)), None)
