"""`TorchTrainer` for nodes that come and go; what Ray Train 2.60 has no public place for.

What it does by itself: it sizes an elastic run by a list of nodes that is up to 20 s old and that includes nodes about
to go, so that after a lost node, or after a notice, it tries to start at the old size until that list is renewed (for a
notice of two minutes, two minutes); it ends running workers where they are to start more of them; a worker that is
lost while its group is starting ends the run; and while an elastic run waits for nodes, its controller keeps a CPU
busy and answers nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from unittest import mock

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import (
    FinishedState,
    InitializingState,
    ReschedulingState,
    RestartingState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api import data_parallel_trainer

_WAITING = (InitializingState, RestartingState, ReschedulingState)
_PAUSE_S = 0.5
_FAILED_STARTS = 3

logger = logging.getLogger(__name__)


class Trainer(TorchTrainer):
    """With `Controller`, and where the number of workers is a range, with `LastingNodes`.

    Two functions are called in the controller: `asked_to_end` says whether a run that waits for nodes shall end (its
    result is then None), and `ask_to_resize` has the workers save and end, to be started again in their new number.
    Signals are the caller's.
    """

    def __init__(self, *args, asked_to_end: Callable[[], bool], ask_to_resize: Callable[[], None], **others):
        super().__init__(*args, **others)
        self._asked_to_end, self._ask_to_resize = asked_to_end, ask_to_resize

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **others):
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = LastingNodes(self.scaling_config, self._ask_to_resize)
        others |= {"scaling_policy": scaling_policy, "asked_to_end": self._asked_to_end}
        with mock.patch.object(data_parallel_trainer, "TrainController", Controller):
            return super()._initialize_and_run_controller(**others)

    def _register_sigint_handler(self, controller) -> None:
        """None: Ray Train's would replace the caller's, and end the workers before they could save."""


class LastingNodes(ElasticScalingPolicy):
    """Counts only nodes that are alive and not about to go, and never ends running workers: they could not save.

    Where there is room for more, it asks them to end; where there is less, failures and notices have ended them.
    """

    def __init__(self, scaling_config: ScalingConfig, ask_to_resize: Callable[[], None]):
        super().__init__(scaling_config)
        self._ask_to_resize = ask_to_resize

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        asked = self._latest_reserved_resources_query_time
        super()._get_reserved_resources()
        if (
            self._latest_reserved_resources_query_time != asked
            and self._latest_reserved_resources is not None
        ):
            try:
                lasting = lasting_nodes()
            except Exception:  # as Ray Train does with its own question: no decision this time
                logger.warning("Could not list the cluster's nodes; no resize for now.", exc_info=True)
                self._latest_reserved_resources = None
            else:
                found = self._latest_reserved_resources.items()
                self._latest_reserved_resources = {node: of for node, of in found if node in lasting}
        return self._latest_reserved_resources

    def make_decision_for_running_worker_group(
        self, worker_group_state, worker_group_status
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._ask_to_resize()
        return NoopDecision()


class CleanGroup(WorkerGroup):
    """If a worker is lost while the group is starting, the others are ended, and Ray Train may start again.

    The others may be first to tell, by what they raise when they cannot reach it; so that counts too, but as such
    an error may come again and again, three times in a row at most.
    """

    _failed = 0  # in a row

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():  # or else Ray Train has done it
                self.abort()
            CleanGroup._failed += isinstance(error, RayTaskError)
            if isinstance(error, (RayActorError, RayTaskError)) and CleanGroup._failed <= _FAILED_STARTS:
                raise WorkerGroupStartupFailedError(f"workers could not start: {error}") from error
            raise
        CleanGroup._failed = 0


class Controller(TrainController):
    """Makes worker groups as `CleanGroup`; while it waits for nodes it rests in between, and ends if asked to."""

    worker_group_cls = CleanGroup

    def __init__(self, *, asked_to_end: Callable[[], bool], **others):
        super().__init__(**others)
        self._asked_to_end = asked_to_end

    async def _step(self) -> TrainControllerLoopIterationResult:
        state = self.get_state()
        if not isinstance(state, _WAITING):
            return await super()._step()
        if await asyncio.to_thread(self._asked_to_end):
            return TrainControllerLoopIterationResult(
                run_attempt_id=self._get_run_attempt_id(),
                previous_state=state,
                next_state=ShuttingDownState(next_state=FinishedState()),
            )
        result = await super()._step()
        if result.next_state is state:
            await asyncio.sleep(_PAUSE_S)
        return result


def lasting_nodes() -> set[str]:
    """Ids of the nodes that are alive and not about to go, as the head node knows them now."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return alive - set(ray._private.state.state.get_draining_nodes())
