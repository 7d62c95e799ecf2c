"""`TorchTrainer` with policies that suit nodes that come and go; Ray Train 2.60 has no public place for them.

What it does by itself: it sizes an elastic run by a list of nodes that is up to 20 s old and that includes nodes about
to go, so that after a lost node, or after a notice, it tries to start at the old size until that list is renewed (for a
notice of two minutes, two minutes); and a worker that is lost while its group is starting ends the run.
"""

from __future__ import annotations

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)


class Trainer(TorchTrainer):
    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **others):
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = LastingNodes(self.scaling_config)
        others["failure_policy"] = LostStartsAreRetried(self.run_config.failure_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **others)


class LastingNodes(ElasticScalingPolicy):
    """Counts only nodes that are alive and not about to go, and leaves it to failures and notices to end workers.

    Were running workers resized to fewer when a node is drained, they would be ended before they could save.
    """

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        lasting = lasting_nodes()
        return super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node in lasting}
        )

    def make_decision_for_running_worker_group(
        self, worker_group_state, worker_group_status
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()
        return decision


class LostStartsAreRetried(DefaultFailurePolicy):
    """A worker lost while its group is starting is a reason to start again, as it is later."""

    def _is_retryable_error(self, training_failed_error: Exception) -> bool:
        lost = isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, RayActorError
        )
        return lost or super()._is_retryable_error(training_failed_error)


def lasting_nodes() -> set[str]:
    """Ids of the nodes that are alive and not about to go, as the head node knows them now."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return alive - set(ray._private.state.state.get_draining_nodes())
