"""What a worker is given of the cluster, and for how many workers the cluster has room now."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

from vlmo_ray.config import ClusterConfig
from vlmo_ray.errors import UserError
from vlmo_ray.launch.ray_private import infeasible_groups

_LEAST_CPUS = 0.1875  # of a CPU worker with its data


@dataclasses.dataclass(frozen=True)
class Share:
    """What a worker is given of the cluster."""

    cpus: float  # reserved on its node, for itself and its data tasks
    data_tasks: int  # at once
    room: int  # for how many workers there is room now


@dataclasses.dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float = 0.0


def share(cluster: ClusterConfig, nodes: list[Node], autoscaling: bool = False, parts: int = 1) -> Share:
    """What each worker reserves on one of `nodes`; UserError if there is no room for `min_workers` of that.

    `parts` is the number of runs that share the nodes.

    With an autoscaler it is what the config says: the nodes are yet to come.

    A worker's data tasks run on its node and under its reservation, asking for no CPU of their own, so they always have
    theirs. Without GPUs a worker takes less than it asks for where else not even `min_workers` would have room.
    """
    least = parts * cluster.min_workers
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    # sixteenths are exact in binary, so that sums of them divide without a remainder
    need = math.ceil(16 * (cluster.cpus_per_worker + cluster.data_cpus_per_worker)) / 16
    if autoscaling:
        return Share(need, cluster.data_cpus_per_worker, room(nodes, need, cluster.gpus_per_worker))
    if cluster.gpus_per_worker:
        if least * cluster.gpus_per_worker > gpus:
            raise UserError(
                f"{least} workers with {cluster.gpus_per_worker} GPU each are more than this cluster has "
                f"({gpus:g} GPUs); lower cluster.min_workers, add nodes, or train on CPUs with "
                "--set cluster.gpus_per_worker=0"
            )
        found = Share(need, cluster.data_cpus_per_worker, room(nodes, need, cluster.gpus_per_worker))
        if least > found.room:
            raise UserError(
                f"{least} workers with {cluster.cpus_per_worker:g} CPUs and "
                f"{cluster.data_cpus_per_worker} for data each are more than this cluster has room for: {found.room}, "
                f"with {cpus:g} CPUs on {len(nodes)} nodes; lower cluster.cpus_per_worker or "
                "cluster.data_cpus_per_worker"
            )
        return found
    pieces = {math.floor(16 * node.cpus / k) / 16 for node in nodes for k in range(1, int(node.cpus / _LEAST_CPUS) + 1)}
    for size in sorted({need} | {size for size in pieces if size < need}, reverse=True):
        if (fits := room(nodes, size)) >= least:
            return Share(size, max(1, round(size / need * cluster.data_cpus_per_worker)), fits)
    raise UserError(
        f"{least} workers are more than this cluster has room for ({cpus:g} CPUs, at least {_LEAST_CPUS} "
        "for a worker with its data); lower cluster.min_workers or add nodes"
    )


def room(nodes: list[Node], cpus: float, gpus: int = 0) -> int:
    """How many workers of that size fit, each on one node."""
    return sum(int(min(node.cpus // cpus, node.gpus // gpus if gpus else math.inf)) for node in nodes)


def living_nodes(leaving: Iterable[str] = ()) -> list[Node]:
    """The nodes that Ray lists as alive, without those whose ids are in `leaving`."""
    import ray

    listed = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in listed]


class Claims:
    """Placement groups of one worker each: Ray's scheduler says how many workers have room now.

    A list of nodes cannot say that. For some seconds Ray lists a lost node as alive, and it lists nodes that are about
    to be taken away or that are full of other work. A claim stands once its resources are reserved. A claim that waits
    makes an autoscaler add nodes. Ray drops the claims when the driver's job ends, even if the driver is killed.

    `ray.autoscaler.sdk.request_resources` is no alternative: Ray Data's coordinator calls it every 20 s for the whole
    cluster and overwrites what others asked for, and the request of a killed driver stays.
    """

    def __init__(self, cpus: float, gpus: int = 0):
        self._bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._groups: list = []

    def want(self, count: int) -> None:
        """Holds `count` claims; those that do not stand are dropped first."""
        from ray.util import placement_group, remove_placement_group

        if len(self._groups) > count:
            standing = self._which_stand()
            self._groups.sort(key=lambda group: group not in standing)
            for group in self._groups[count:]:
                remove_placement_group(group)
            del self._groups[count:]
        while len(self._groups) < count:
            self._groups.append(placement_group([self._bundle]))

    def standing(self) -> int:
        """How many claims have their resources."""
        return len(self._which_stand())

    def wait(self, seconds: float) -> bool:
        """Whether a claim stands within that time."""
        until = time.monotonic() + seconds
        while not (found := self.standing()) and self._groups and time.monotonic() < until:
            time.sleep(0.05)
        return found > 0

    def check(self, cluster: ClusterConfig) -> None:
        """Raises UserError if the autoscaler says that no node it may add has room for a worker."""
        hopeless = infeasible_groups() or set()
        if not self._groups or any(group.id.hex() not in hopeless for group in self._groups):
            return
        cpus, gpus = self._bundle["CPU"], self._bundle.get("GPU", 0)
        if any(room([node], cpus, int(gpus)) for node in living_nodes()):
            return  # there are such nodes: they are full, and the cluster may have no more of them
        raise UserError(
            f"no node that the autoscaler may add has room for a worker with {cluster.cpus_per_worker:g} CPUs, "
            f"{cluster.data_cpus_per_worker} more for data and {gpus:g} GPUs, all on one node; lower "
            "cluster.cpus_per_worker or cluster.data_cpus_per_worker, or add a larger node type to the cluster's file"
        )

    def _which_stand(self) -> set:
        from ray.util import placement_group_table

        if not self._groups:
            return set()
        states = placement_group_table()
        return {group for group in self._groups if states.get(group.id.hex(), {}).get("state") == "CREATED"}
