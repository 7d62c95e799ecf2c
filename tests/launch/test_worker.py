"""What a worker is told through the run's store: looked up by a thread, so slow storage delays no step."""

import contextlib
import dataclasses
import datetime
import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from small_run import SMALL, begin_at, job

from vlmo_ray.data.store import Store
from vlmo_ray.launch import worker
from vlmo_ray.launch.group import process_group
from vlmo_ray.launch.stop import STOP
from vlmo_ray.launch.worker import RESIZE, Marks
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import Outcome, train


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(worker, "_LOOK_S", 0.01)


def until(found) -> None:
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def holder(run: Store, token: str) -> None:
    fields = {"host": "elsewhere", "boot": "", "pid": 7, "process_start": "", "renewed": 0.0}
    run.write("lease.json", json.dumps({"token": token} | fields).encode())


def test_marks_are_seen(tmp_path):
    run = Store(str(tmp_path))
    holder(run, "mine")
    marks = Marks(run, "mine")
    assert marks.check() is Notice.NONE
    for name, notice in ((RESIZE, Notice.RESIZE), (STOP, Notice.STOP)):
        run.write(name, b"")
        until(lambda notice=notice: marks.check() is notice)


@pytest.mark.parametrize("damage", [lambda run: holder(run, "another"), lambda run: run.write("lease.json", b"{")])
def test_a_lease_that_is_lost_or_unreadable_ends_the_training(tmp_path, damage):
    """Also where nobody expected the error: the thread must not end unheard."""
    run = Store(str(tmp_path))
    holder(run, "mine")
    marks = Marks(run, "mine")
    damage(run)
    with pytest.raises(ValueError, match=r"taken over by process 7 on elsewhere|Expecting property name"):
        until(lambda: marks.check() is not Notice.NONE)


def test_every_step_is_observed_and_steps_done_again_are_counted(scenes, tmp_path):
    seen = []

    def observe(figures, terms):
        seen.append(figures | {"terms": terms})

    first = job(scenes, tmp_path / "whole")
    assert train(first, observe=observe).step == 10
    assert [figures["step"] for figures in seen] == list(range(1, 11))
    assert {figures["total_steps"] for figures in seen} == {10} and seen[0]["terms"] == ("itc", "itm", "mlm")
    assert not any(figures["repeated_steps"] for figures in seen)
    ages = [figures["checkpoint_age_s"] for figures in seen]
    assert all(0 <= age < 600 for age in ages) and ages[1] > ages[0]
    metrics, _ = read_metrics(Store(str(tmp_path / "whole")))
    assert [figures["loss"] for figures in seen] == [m["loss"] for m in metrics]

    lost = tmp_path / "lost"  # what a run leaves that was killed after step 10, its newest checkpoint at step 4
    begin_at(lost, tmp_path / "whole" / "checkpoint-00000004")
    shutil.copytree(tmp_path / "whole" / "metrics", lost / "metrics")
    seen.clear()
    assert train(job(scenes, lost), observe=observe).step == 10
    assert [figures["step"] for figures in seen] == list(range(5, 11))
    assert [figures["repeated_steps"] for figures in seen] == [6, 0, 0, 0, 0, 0]


def test_what_is_observed_goes_to_the_gauges_of_the_run(monkeypatch):
    """`work` hands the gauges to the loop."""
    import ray.train
    import ray.train.torch

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1,
                              get_local_rank=lambda: 0)  # fmt: skip
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "Marks", lambda run, token: None)
    monkeypatch.setattr(worker, "process_group", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(worker, "Gauges", lambda run: ("gauges of", run))
    given = {}
    monkeypatch.setattr(worker, "train", lambda spec, **options: given.update(options) or Outcome(10))
    threads = torch.get_num_threads()
    try:
        assert worker.work(RunSpec(SMALL, "data", "s3://runs/one/", ""), "token")["step"] == 10
    finally:
        torch.set_num_threads(threads)
    assert given["observe"] == ("gauges of", "one")


def test_training_goes_on_while_the_storage_does_not_answer(scenes, tmp_path, monkeypatch):
    """Neither metrics nor marks get through until the last step is done."""
    answers, held = threading.Event(), []

    def holding(real):
        def call(store, name, *given):
            if name.startswith(("metrics/", "tensorboard/", STOP, RESIZE, "lease")) and not answers.is_set():
                held.append(name)
                assert answers.wait(60)
            return real(store, name, *given)

        return call

    for name in ("write", "read_version", "size"):
        monkeypatch.setattr(Store, name, holding(getattr(Store, name)))
    monkeypatch.setattr("vlmo_ray.runs.metrics._FLUSH_S", 0.0)
    monkeypatch.setattr("vlmo_ray.runs.metrics._SEGMENT_STEPS", 3)
    marks, run = Marks(Store(str(tmp_path)), "mine"), Store(str(tmp_path))
    asked = []
    cluster = dataclasses.replace(SMALL.cluster, notice_every=1)
    spec = job(scenes, tmp_path, cluster=cluster, checkpoint_every=100)
    outcomes = []

    def notice() -> Notice:
        asked.append(1)
        return marks.check()

    thread = threading.Thread(target=lambda: outcomes.append(train(spec, notice=notice)))
    thread.start()
    until(lambda: len(asked) == 10)
    assert any(name.startswith("metrics/") for name in held) and "lease.json" in held and not read_metrics(run)[0]
    answers.set()
    thread.join()
    assert outcomes[0].step == 10 and not outcomes[0].stopped
    assert [m["step"] for m in read_metrics(run)[0]] == list(range(1, 11))


def test_a_lost_lease_stops_a_run_without_saving(scenes, tmp_path):
    run = Store(str(tmp_path))
    holder(run, "another")
    marks = Marks(run, "mine")

    def notice() -> Notice:
        time.sleep(0.05)
        return marks.check()

    cluster = dataclasses.replace(SMALL.cluster, notice_every=1)
    outcome = train(job(scenes, tmp_path, cluster=cluster, checkpoint_every=100), notice=notice)
    assert outcome.step < 10 and "was taken over by process 7 on elsewhere" in outcome.stopped
    assert not run.list("checkpoint-")


def test_workers_wait_longer_for_each_other_than_one_may_wait_for_storage(monkeypatch):
    """With PyTorch's ten minutes for NCCL a slow upload of one would end all."""
    made = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *given, **more: made.append((given, more)))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda place: place)
    with process_group(0, 2, torch.device("cuda"), 3600):
        [((backend,), more)] = made
    assert backend == "nccl" and more["timeout"] == datetime.timedelta(seconds=1800 + 3600)
