"""What the launcher needs of Ray and Ray has no public name for; one function for each use."""

from __future__ import annotations


def infeasible_groups() -> set[str] | None:
    """Ids (hex) of the placement groups that the autoscaler can add no nodes for; None where no autoscaler runs.

    Without it an empty autoscaling cluster looks like one that is too small, and the run would be refused. The
    autoscaler (v2, the default of `ray up` and KubeRay) reports this to the head; what it may grow to it keeps to
    itself: `ray._private.state.get_cluster_config` is None. `ray status` prints the same report.
    """
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]  # generated
    gcs_client = global_worker.gcs_client  # pyright: ignore[reportAttributeAccessIssue]  # set when Ray starts
    reply.ParseFromString(gcs_client.get_cluster_status())
    state = reply.autoscaling_state
    if not state.autoscaler_state_version:
        return None
    # the details read "<id>:PACK|PENDING"
    return {request.details.partition(":")[0] for request in state.infeasible_gang_resource_requests}


def keep_stats_here() -> None:
    """Starts the actor that collects Ray Data's statistics on this process's node.

    It is detached, one for the cluster, and Ray Data puts it on the node of whoever reads first: a worker's, which
    would then never count as idle, and which no autoscaler would take away after the run.
    """
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_stats_actor()
