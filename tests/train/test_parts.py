"""The small parts of training: parameter groups, learning rate, meters, and how a cluster's CPUs are shared."""

import asyncio
import itertools
import json
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    FinishedState,
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from vlmo_ray.config import MODEL_SIZES, ClusterConfig
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch import trainer
from vlmo_ray.launch.fit import Node, Share, first_user_error, share
from vlmo_ray.launch.trainer import CleanGroup, Controller, LastingNodes
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.metrics import Meters, read_metrics
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.optim import build_optimizer, decays, lr_at


@pytest.mark.parametrize("size", ["base", "base_plus"])
def test_decay_is_for_matrices_that_transform(size):
    with torch.device("meta"):
        model = VLMo(MODEL_SIZES[size])
    decayed = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    wanted = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
    assert decayed == wanted | {"text_embed.word.weight"}
    optimizer = build_optimizer(Pretraining(model, recipe("tiny")), recipe("tiny"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_learning_rate_rises_then_falls_to_zero_over_all_phases():
    config = recipe("pretrain_1b")
    assert lr_at(0, config) == pytest.approx(5e-5 / 2500)
    assert lr_at(2499, config) == lr_at(2500, config) == pytest.approx(5e-5)
    assert lr_at((2500 + 300_000) // 2, config) == pytest.approx(2.5e-5)
    assert 0 < lr_at(299_999, config) < 1e-9
    rates = [lr_at(step, config) for step in range(2500, 300_000, 5000)]
    assert all(a > b for a, b in itertools.pairwise(rates))  # no jump where the batch doubles


FIGURES = {
    "loss": 1.0,
    "itc": 1.0,
    "itm": 1.0,
    "mlm": 1.0,
    "samples_per_s": 5.0,
    "data_wait": 0.1,
    "step_s": 1.0,
}


def test_meters_write_segments_and_a_repeated_step_counts_once(tmp_path, capsys):
    store = open_store(str(tmp_path), create=True)
    first = Meters(store, 6, 2, ("itc", "itm", "mlm"))
    for step in (1, 2, 3):
        first.add(FIGURES | {"step": step, "masked_rows": 0.0})
        if step == 2:
            first.close_segment()
    first.flush()
    second = Meters(store, 6, 2, ("itc", "itm", "mlm"))
    for step in (3, 4, 5, 6):
        second.add(FIGURES | {"step": step, "loss": 2.0, "masked_rows": 1.0})
    second.flush()
    metrics, repeated = read_metrics(store)
    assert [(m["step"], m["loss"]) for m in metrics] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]
    assert repeated == [3]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["2/6", "4/6", "6/6"]
    assert "0:02 left" in printed[1] and "(2 rows masked)" in printed[1] and "masked" not in printed[0]
    assert all(json.loads(line) for name in store.list("metrics/") for line in store.read(name).splitlines())


def test_cpu_workers_take_less_where_else_too_few_had_room():
    assert share(ClusterConfig(max_workers=2, gpus_per_worker=0), [Node(16)]) == Share(3.0, 2, room=5)
    assert share(ClusterConfig(max_workers=3, gpus_per_worker=0), [Node(2), Node(2)]) == Share(2.0, 1, room=2)
    for cpus in ([1], [2], [3, 1], [4, 0], [7, 2, 2]):
        for workers in (1, 2, 3, 4):
            cluster = ClusterConfig(workers, workers, gpus_per_worker=0)
            found = share(cluster, [Node(count) for count in cpus])
            assert found.cpus >= 0.1875 and found.data_tasks >= 1
            # as Ray Train counts: each node's bundles are summed up, then divided
            room = [int(sum([found.cpus] * int(count // found.cpus)) // found.cpus) for count in cpus]
            assert sum(room) == found.room >= workers


def test_gpu_workers_fit_on_nodes_and_not_on_sums():
    nodes = [Node(11, 4), Node(11, 4), Node(32)]
    assert share(ClusterConfig(4, 8), nodes) == Share(3.0, 2, room=6)
    with pytest.raises(
        UserError, match=r"8 workers with 1 CPUs and 2 for data .* room for: 6, with 54 CPUs on 3"
    ):
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


@pytest.mark.parametrize(
    "problem, wanted",
    [
        (ActorDiedError(), [WorkerGroupStartupFailedError] * 5),
        # the connection to a lost worker, or something that comes every time
        (RayTaskError("start", "", ValueError()), [WorkerGroupStartupFailedError] * 3 + [RayTaskError]),
        (ValueError(), [ValueError]),
    ],
)
def test_what_has_started_is_ended_when_a_start_fails(monkeypatch, problem, wanted):
    monkeypatch.setattr(CleanGroup, "_failed", 0)
    group, ended = CleanGroup.__new__(CleanGroup), []

    def start(group):
        raise problem

    monkeypatch.setattr(CleanGroup.__base__, "_start", start)
    monkeypatch.setattr(CleanGroup, "has_started", lambda group: not ended)
    monkeypatch.setattr(CleanGroup, "abort", lambda group: ended.append(True))
    for kind in wanted:
        ended.clear()
        with pytest.raises(kind):
            group._start()
        assert ended == [True]


@pytest.mark.parametrize(
    "begins", [InitializingState(), ReschedulingState(ValueError()), RestartingState(None)]
)
def test_a_controller_rests_while_it_waits_and_then_ends_if_asked(monkeypatch, begins):
    controller, rested, asked = Controller.__new__(Controller), [], [False, False, True]
    controller._state, controller._run_attempt_id = begins, "first"
    controller._asked_to_end = lambda: asked.pop(0)
    goes_on = [controller._state, SchedulingState(None)]

    async def step(controller):
        return SimpleNamespace(next_state=goes_on.pop(0))

    async def rest(seconds):
        rested.append(seconds)

    monkeypatch.setattr(TrainController, "_step", step)
    monkeypatch.setattr(trainer.asyncio, "sleep", rest)
    assert asyncio.run(controller._step()).next_state is begins and rested == [0.5]
    assert isinstance(asyncio.run(controller._step()).next_state, SchedulingState) and rested == [0.5]
    assert isinstance(asyncio.run(controller._step()).next_state.next_state, FinishedState)


def test_running_workers_are_asked_to_make_room_for_more_and_never_ended(monkeypatch):
    config, asked = ScalingConfig(num_workers=(1, 3), elastic_resize_monitor_interval_s=0.001), []
    policy = LastingNodes(config, lambda: asked.append(True))
    group = SimpleNamespace(start_time=0.0, num_workers=2)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    for count, wanted in ((1, []), (2, []), (3, [True])):
        monkeypatch.setattr(
            policy, "_get_reserved_resources", lambda count=count: {"a": {"CPU": float(count)}}
        )
        time.sleep(0.01)
        decision = policy.make_decision_for_running_worker_group(group, None)
        assert isinstance(decision, NoopDecision) and asked == wanted


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(UserError("s3://bucket/run: it is away")),
        WorkerGroupError(
            "rank 1",
            {0: ValueError(), 1: RayTaskError("train", "", UserError("s3://bucket/run: it is away"))},
        ),
    ],
)
def test_what_the_user_can_mend_is_found_in_ray_trains_errors(error):
    assert str(first_user_error(pickle.loads(pickle.dumps(error)))) == "s3://bucket/run: it is away"
    assert first_user_error(ControllerError(ValueError("another"))) is None
