"""What the launcher needs of Ray and Ray has no public name for; one function for each use."""

from __future__ import annotations

from collections.abc import Mapping


def largest_cluster() -> Mapping[str, float] | None:
    """The most of each resource that the autoscaler may provide; None where no autoscaler runs.

    Without it an empty autoscaling cluster looks like one that is too small, and the run would be refused. Ray Train
    asks the same function for the same reason: `WorkerGroup._check_cluster_resources_and_raise_if_insufficient` in
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/execution/worker_group/worker_group.py
    """
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config()
