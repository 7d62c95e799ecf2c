"""The driver of a run: starts runs of Ray Train one after another until one is done.

Each of them has a fixed number of workers. When nodes come or go its workers save and return, or it fails, and the
driver starts the next one with as many workers as there is room for then.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Sequence

from vlmo_ray.config import ClusterConfig
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.resources import Claims, Share, living_nodes, room
from vlmo_ray.launch.stop import Stop
from vlmo_ray.launch.worker import RESIZE
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.events import tell

_SAME_ERROR = 3  # failures with one error, without a new checkpoint in between, after which a run is given up


class Driver:
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
        tell("workers", f"starting {size} workers", workers=size)
        fit = self._start(size)
        resizing = self._watch(fit, size)
        from ray.exceptions import RayActorError
        from ray.train import PreemptionError, TrainingFailedError

        try:
            outcome = fit.result()
        except PreemptionError as error:  # the node was gone before the workers had saved
            self._leaving |= set(error.preemption_info.preempted_node_ids)
            tell("notice", f"the workers lost a node before they had saved: {error}")
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
            tell("notice" if outcome["leaving"] else "resize", f"the workers ended at {outcome['stopped']}")
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
            tell("failed", f"the workers failed {_SAME_ERROR} times with the same error since the newest checkpoint")
            return False
        if 0 <= allowed < failures:
            return False
        tell(
            "retry",
            f"the workers failed, {failures} of {allowed if allowed >= 0 else 'any number of'} times that "
            "cluster.max_failures allows without a new checkpoint; starting again",
            error=problem,
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
                tell(
                    "waiting",
                    f"waiting for nodes since {told} min: room for {size} workers, cluster.min_workers is "
                    f"{cluster.min_workers}",
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
                    tell("resize", f"room for {more} more workers: the {size} workers save and start again")
        return resizing

    def _slices_left(self) -> list[int]:
        """The slices of a global batch in each phase that is not over."""
        state = Checkpoints(self._run).newest()
        step = state.step if state else 0
        ends = itertools.accumulate(steps for steps, _ in self._phases)
        return [slices for end, (_, slices) in zip(ends, self._phases, strict=True) if end > step]

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
