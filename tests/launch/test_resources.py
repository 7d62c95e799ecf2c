"""How a cluster's CPUs and GPUs are shared among workers, and what Ray's scheduler says about the room for them."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from vlmo_ray.config import ClusterConfig
from vlmo_ray.errors import UserError
from vlmo_ray.launch import ray_private, resources
from vlmo_ray.launch.resources import Claims, Node, Share, living_nodes, room, share


def test_cpu_workers_take_less_where_else_too_few_had_room():
    assert share(ClusterConfig(max_workers=2, gpus_per_worker=0), [Node(16)]) == Share(3.0, 2, room=5)
    assert share(ClusterConfig(max_workers=3, gpus_per_worker=0), [Node(2), Node(2)]) == Share(2.0, 1, room=2)
    for cpus in ([1], [2], [3, 1], [4, 0], [7, 2, 2]):
        for workers in (1, 2, 3, 4):
            cluster = ClusterConfig(workers, workers, gpus_per_worker=0)
            found = share(cluster, [Node(count) for count in cpus])
            assert found.cpus >= 0.1875 and found.data_tasks >= 1
            assert sum(int(count // found.cpus) for count in cpus) == found.room >= workers


def test_gpu_workers_fit_on_nodes_and_not_on_sums():
    nodes = [Node(11, 4), Node(11, 4), Node(32)]
    assert share(ClusterConfig(4, 8), nodes) == Share(3.0, 2, room=6)
    with pytest.raises(UserError, match=r"8 workers with 1 CPUs and 2 for data .* room for: 6, with 54 CPUs on 3"):
        share(ClusterConfig(8, 8), nodes)


@pytest.mark.parametrize(
    "cluster, cpus, gpus, words",
    [
        (
            ClusterConfig(min_workers=4, max_workers=4),
            64,
            2,
            "4 workers with 1 GPU each are more than this cluster has",
        ),
        (
            ClusterConfig(min_workers=2, max_workers=2, cpus_per_worker=4),
            8,
            2,
            "2 workers with 4 CPUs and 2 for data each are more than this cluster has room for: 1",
        ),
        (ClusterConfig(min_workers=99, max_workers=99, gpus_per_worker=0), 2, 0, "99 workers are more than"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused(cluster, cpus, gpus, words):
    with pytest.raises(UserError, match=words):
        share(cluster, [Node(cpus, gpus)])


@pytest.mark.ray
@pytest.mark.slow
def test_a_claim_stands_when_its_resources_are_free(ray_cluster):
    """The oracle is the cluster of 2 CPUs."""
    assert room(living_nodes(), 0.75) == 2
    busy, waiting = Claims(1.0), Claims(0.75)
    try:
        busy.want(1)
        assert busy.wait(10) and busy.standing() == 1
        waiting.want(3)
        assert waiting.wait(10)
        time.sleep(0.5)
        assert waiting.standing() == 1  # the other node's worth of CPUs is taken, though the node is listed
        waiting.want(1)  # keeps the one that stands
        assert waiting.standing() == 1
        waiting.want(2)
        busy.want(0)
        until = time.monotonic() + 10
        while waiting.standing() < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert waiting.standing() == 2
    finally:
        busy.want(0)
        waiting.want(0)
    assert not waiting.wait(10)  # nothing to wait for


@pytest.mark.ray
@pytest.mark.slow
def test_rays_private_names_are_there(ray_cluster):
    assert ray_private.infeasible_groups() is None  # this cluster has no autoscaler
    state = GetClusterStatusReply().autoscaling_state
    assert not state.autoscaler_state_version and not list(state.infeasible_gang_resource_requests)


@pytest.mark.parametrize("busy, refused", [([Node(4)], True), ([Node(4), Node(16)], False)])
def test_a_worker_that_no_node_can_ever_hold_is_refused(monkeypatch, busy, refused):
    """The autoscaler reports as much for a claim that waits for its turn; then there are nodes of that size."""
    claims = Claims(8.0)
    claims._groups = [SimpleNamespace(id=SimpleNamespace(hex=lambda: "1f"))]
    monkeypatch.setattr(resources, "living_nodes", lambda: busy)
    for report in (None, set(), {"2e"}):
        monkeypatch.setattr(resources, "infeasible_groups", lambda report=report: report)
        claims.check(ClusterConfig())
    monkeypatch.setattr(resources, "infeasible_groups", lambda: {"1f", "2e"})
    with pytest.raises(UserError, match="no node that the autoscaler may add") if refused else nullcontext():
        claims.check(ClusterConfig())


def test_with_an_autoscaler_an_empty_cluster_is_not_too_small():
    assert share(ClusterConfig(4, 8), [Node(1)], autoscaling=True) == Share(3.0, 2, room=0)
    assert share(ClusterConfig(4, 8, gpus_per_worker=0), [], autoscaling=True) == Share(3.0, 2, room=0)


def test_nodes_that_are_lost_or_leaving_do_not_count(monkeypatch):
    import ray

    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 8.0}},
        {"NodeID": "c", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "d", "Alive": True, "Resources": {}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert living_nodes({"c", "gone"}) == [Node(4, 2), Node(0, 0)]
