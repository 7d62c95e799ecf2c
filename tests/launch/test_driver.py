"""The driver's loop, with made-up runs of Ray Train: when it starts how many workers, and how it ends.

Whether that is so on a cluster is tested by `test_fit.py` and `test_chaos.py`.
"""

import concurrent.futures
import pickle
import threading
import time
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, WorkerGroupError
from small_run import SMALL

from vlmo_ray.config import ClusterConfig
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch import driver as launch
from vlmo_ray.launch.driver import Driver, first_user_error
from vlmo_ray.launch.resources import Node, Share
from vlmo_ray.launch.stop import Stop
from vlmo_ray.launch.worker import RESIZE
from vlmo_ray.runs.checkpoint import STATE, _sealed
from vlmo_ray.runs.checkpoints import name_of
from vlmo_ray.runs.state import TrainState

CLUSTER = ClusterConfig(1, 3, gpus_per_worker=0, start_timeout_s=0.2, resize_interval_s=0.1, max_failures=2)
DONE = {"step": 10, "stopped": "", "again": False, "requested": False, "leaving": []}


class World:
    """A cluster of nodes of one CPU, a worker each; and a script of runs: what each returns, raises or waits for."""

    def __init__(
        self, tmp_path, monkeypatch, *script, nodes: str = "ab", phases=((10, 6),), autoscaling=False, **changes
    ):
        self.nodes, self.broken = set(nodes), set()  # `broken`: listed, but nothing can be started there
        self.run, self.started, self.claimed = open_store(str(tmp_path), create=True), [], 0
        self.script, self.hopeless = list(script), False
        monkeypatch.setattr(launch, "Claims", lambda cpus, gpus: self)
        monkeypatch.setattr(launch, "living_nodes", lambda leaving: [Node(1)] * len(self.nodes - leaving))
        self.stop = Stop(self.run)
        cluster = ClusterConfig(**(vars(CLUSTER) | changes))
        self.driver = Driver(cluster, Share(1.0, 1, 3), autoscaling, self.run, self.stop, self.start, phases)

    # ---- as Claims ----

    def want(self, count: int) -> None:
        self.claimed = count

    def standing(self) -> int:
        running = self.started[-1] if self.started and not self.fit.done() else 0
        return min(self.claimed, len(self.nodes - self.broken) - running)

    def wait(self, seconds: float) -> bool:
        return self.standing() > 0

    def check(self, cluster: ClusterConfig) -> None:
        if self.hopeless:
            raise UserError("no node has room")

    # ---- as Ray Train ----

    def start(self, size: int) -> concurrent.futures.Future:
        assert self.claimed == 0, "Ray Train could not reserve what is still claimed"
        self.started.append(size)
        self.fit = concurrent.futures.Future()
        scene = self.script.pop(0)
        threading.Thread(target=self.play, args=(scene,), daemon=True).start()
        return self.fit

    def play(self, scene: dict | Exception | Callable[[], dict]) -> None:
        try:
            if isinstance(scene, Exception):
                raise scene
            self.fit.set_result(scene() if callable(scene) else scene)
        except Exception as error:
            self.fit.set_exception(error)


def again(why: str, leaving: tuple[str, ...] = ()) -> dict:
    return {"step": 5, "stopped": f"step 5: {why}", "again": True, "requested": False, "leaving": list(leaving)}


def test_a_node_with_notice_is_left_out_from_then_on(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, again("saved", ("b",)), again("saved", ("c",)), DONE, nodes="abc")
    assert world.driver.train() == DONE and world.started == [3, 2, 1]
    assert world.claimed == 0


def test_a_notice_that_ran_out_costs_no_failure(tmp_path, monkeypatch):
    lost = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"b": [1]}))
    world = World(tmp_path, monkeypatch, lost, DONE, max_failures=0)
    assert world.driver.train() == DONE and world.started == [2, 1]


@pytest.mark.parametrize(
    "problem", [WorkerGroupError("", {0: ValueError()}), ControllerError(ValueError()), ActorDiedError()]
)
def test_failures_are_counted_over_the_run(tmp_path, monkeypatch, problem):
    world = World(tmp_path, monkeypatch, problem, again("saved"), problem, DONE)
    assert world.driver.train() == DONE and world.started == [2, 2, 2, 2]
    world = World(tmp_path, monkeypatch, problem, again("saved"), problem, problem)
    with pytest.raises(type(problem)):
        world.driver.train()


def checkpoint(run, step: int):
    """A scene: the run gets a checkpoint, and then its workers are lost."""

    def scene() -> dict:
        state = TrainState.of(step, SMALL, "data", [(0, "attempt")])
        run.write(f"{name_of(step)}/{STATE}", _sealed(state.state_dict() | {"files": {}}).encode())
        raise WorkerGroupError("", {0: ActorDiedError()})

    return scene


def test_a_new_checkpoint_starts_the_count_anew(tmp_path, monkeypatch):
    run = open_store(str(tmp_path), create=True)
    lost = [WorkerGroupError("", {0: ActorDiedError()})] * 2
    world = World(tmp_path, monkeypatch, *lost, checkpoint(run, 4), *lost[:1], checkpoint(run, 8), *lost[:1], DONE)
    assert world.driver.train() == DONE and len(world.started) == 7
    world = World(tmp_path, monkeypatch, *lost, *lost)  # of the same step as the newest checkpoint
    with pytest.raises(WorkerGroupError):
        world.driver.train()
    assert len(world.started) == 3


@pytest.mark.parametrize("allowed", [-1, 50])
def test_an_error_that_comes_back_is_given_up_whatever_the_budget(tmp_path, monkeypatch, allowed, capsys):
    same = [WorkerGroupError("", {1: RuntimeError(f"out of memory: {i} MB")}) for i in range(4)]
    lost = [WorkerGroupError("", {0: ActorDiedError()})] * 9  # spot nodes may well be lost in a row
    world = World(tmp_path, monkeypatch, *lost, *same, max_failures=allowed)
    with pytest.raises(WorkerGroupError):
        world.driver.train()
    assert len(world.started) == 9 + 3
    assert "3 times with the same error" in capsys.readouterr().out


def test_workers_are_left_alone_where_more_would_save_no_time(tmp_path, monkeypatch):
    """Of 3 slices, 2 workers do 2 and 1; a third makes the largest share smaller, but not of 4 slices."""

    def for_a_while() -> dict:
        world.nodes |= {"c"}
        time.sleep(1.5)
        return again("saved") if world.run.exists(RESIZE) else DONE

    world = World(tmp_path, monkeypatch, for_a_while, phases=[(10, 4)])
    assert world.driver.train() == DONE and world.started == [2] and world.claimed == 0
    world = World(tmp_path, monkeypatch, for_a_while, DONE, phases=[(5, 4), (5, 3)])
    assert world.driver.train() == DONE and world.started == [2, 3]


def test_a_phase_that_is_over_gives_no_reason_for_more(tmp_path, monkeypatch):
    def for_a_while() -> dict:
        world.nodes |= {"c"}
        time.sleep(1.5)
        return again("saved") if world.run.exists(RESIZE) else DONE

    run = open_store(str(tmp_path), create=True)
    lost = checkpoint(run, 5)  # of the first phase, the only one that 3 workers would speed up
    world = World(tmp_path, monkeypatch, lost, for_a_while, phases=[(5, 3), (5, 4)])
    assert world.driver.train() == DONE and world.started == [2, 2]


def test_no_more_workers_than_save_time_are_started(tmp_path, monkeypatch):
    """Of 4 slices, the worker with the most has two, of 3 workers as of 2."""
    world = World(tmp_path, monkeypatch, DONE, nodes="abc", phases=[(10, 4)])
    assert world.driver.train() == DONE and world.started == [2] and world.claimed == 0
    world = World(tmp_path, monkeypatch, DONE, nodes="abc", phases=[(10, 4)], min_workers=3)
    assert world.driver.train() == DONE and world.started == [3]


def test_an_autoscaler_is_asked_for_what_saves_time(tmp_path, monkeypatch):
    """An empty cluster grows on request, to 2 of at most 3 nodes: a third would save no time."""
    world = World(tmp_path, monkeypatch, DONE, nodes="", phases=[(10, 4)], autoscaling=True)
    asked = []

    def want(count: int) -> None:
        world.claimed = count
        asked.append(count)
        world.nodes |= set("abc"[:count])

    world.want = want
    assert world.driver.train() == DONE and world.started == [2] and max(asked) == 2


def test_workers_for_which_no_node_can_be_added_are_refused(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, nodes="", autoscaling=True)
    world.hopeless = True
    with pytest.raises(UserError, match="no node has room"):
        world.driver.train()
    assert world.claimed == 0


def test_what_the_user_can_mend_ends_the_run_at_once(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, ControllerError(UserError("s3://bucket/run: it is away")))
    with pytest.raises(UserError, match="it is away"):
        world.driver.train()
    assert world.started == [2]


def test_a_lost_node_that_is_still_listed_holds_nobody_up_for_ever(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, DONE)
    world.broken = {"b"}
    began = time.monotonic()
    assert world.driver.train() == DONE and world.started == [1]
    assert time.monotonic() - began > CLUSTER.start_timeout_s


def test_workers_are_asked_to_make_room_for_more(tmp_path, monkeypatch):
    def until_asked() -> dict:
        time.sleep(0.5)
        assert not world.run.exists(RESIZE)
        world.nodes |= {"c"}
        while not world.run.exists(RESIZE):
            time.sleep(0.02)
        return again("saved, to go on with more workers")

    world = World(tmp_path, monkeypatch, until_asked, DONE)
    world.run.write(RESIZE, b"")  # left by a driver that was killed
    assert world.driver.train() == DONE and world.started == [2, 3]
    assert not world.run.exists(RESIZE)


def test_workers_are_left_alone_where_more_are_only_counted(tmp_path, monkeypatch):
    """A new node that is about to go, or full: listed, but without room."""

    def for_a_while() -> dict:
        world.nodes |= {"c"}
        world.broken = {"c"}
        time.sleep(1.5)
        assert not world.run.exists(RESIZE)
        return DONE

    world = World(tmp_path, monkeypatch, for_a_while)
    assert world.driver.train() == DONE and world.started == [2]


def test_a_run_without_room_waits_and_ends_on_request(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, again("saved", ("a",)), min_workers=2)
    threading.Timer(1.0, world.stop.ask).start()
    assert world.driver.train() is None and world.started == [2]


def test_a_run_that_is_another_drivers_ends(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, lambda: time.sleep(30))
    threading.Timer(0.5, world.stop.lose, ["taken over"]).start()
    began = time.monotonic()
    with pytest.raises(UserError, match="taken over"):
        world.driver.train()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(UserError("s3://bucket/run: it is away")),
        WorkerGroupError(
            "rank 1", {0: ValueError(), 1: RayTaskError("train", "", UserError("s3://bucket/run: it is away"))}
        ),
    ],
)
def test_what_the_user_can_mend_is_found_in_ray_trains_errors(error):
    assert str(first_user_error(pickle.loads(pickle.dumps(error)))) == "s3://bucket/run: it is away"
    assert first_user_error(ControllerError(ValueError("another"))) is None
