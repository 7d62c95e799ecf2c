"""`TorchTrainer` for nodes that come and go; what Ray Train 2.60 has no public place for.

What it does by itself: it sizes an elastic run by a list of nodes that is up to 20 s old and that includes nodes about
to go, so that after a lost node, or after a notice, it tries to start at the old size until that list is renewed (for a
notice of two minutes, two minutes); and a worker that is lost while its group is starting ends the run.
"""

from __future__ import annotations

import logging

import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup

logger = logging.getLogger(__name__)


class Trainer(TorchTrainer):
    """Where the number of workers is a range, with `LastingNodes`."""

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **others):
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = LastingNodes(self.scaling_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **others)


class LastingNodes(ElasticScalingPolicy):
    """Counts only nodes that are alive and not about to go, and leaves it to failures and notices to end workers.

    Were running workers resized to fewer when a node is drained, they would be ended before they could save.
    """

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
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()
        return decision


class CleanGroup(WorkerGroup):
    """If a worker is lost while the group is starting, the others are ended, and Ray Train may start again."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():  # or else Ray Train has done it
                self.abort()
            if isinstance(error, RayActorError):
                raise WorkerGroupStartupFailedError(f"a worker was lost while starting: {error}") from error
            raise


class LostStartsCleanUp(ControllerCallback):
    """In `RunConfig.callbacks`: the run's controller makes its worker groups as `CleanGroup`."""

    def after_controller_start(self, train_run_context) -> None:
        TrainController.worker_group_cls = CleanGroup


def lasting_nodes() -> set[str]:
    """Ids of the nodes that are alive and not about to go, as the head node knows them now."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return alive - set(ray._private.state.state.get_draining_nodes())
