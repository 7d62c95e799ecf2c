"""What a trial tells Ray Tune of its run."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest
from small_run import SMALL, job

from vlmo_ray.data.store import Store
from vlmo_ray.launch import trial, tune
from vlmo_ray.launch.sweep import Asked, Sweep, Trial
from vlmo_ray.launch.trial import Job, TrialActor
from vlmo_ray.runs.evaluations import Result
from vlmo_ray.runs.lease import held
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("trial")
    assert train(job(scenes, folder)).step == 10
    return Store(str(folder))


def actor_of(run: Store, metric: str, state: str = "running") -> TrialActor:
    actor = TrialActor.__new__(TrialActor)  # without the process that Ray Tune would start
    config = dataclasses.replace(SMALL, log_every=5)
    actor._job, actor._run, actor._last = Job(config, "", "", run, metric, 1), run, {}
    actor._entry, actor._stop, actor._outcome, actor._thread = Trial("000", {}, state), threading.Event(), None, None
    return actor


def test_means_of_a_training_metric_are_told_in_order(run):
    rows, _ = read_metrics(run)
    losses = [row["loss"] for row in rows]
    actor = actor_of(run, "loss")
    assert actor._measured() == [
        {"step": 5, "metric": pytest.approx(sum(losses[:5]) / 5)},
        {"step": 10, "metric": pytest.approx(sum(losses[5:]) / 5)},
    ]
    actor._last = {"step": 5}
    assert [row["step"] for row in actor._measured()] == [10]


def test_skipped_steps_count_for_nothing(run, monkeypatch):
    """Their figures are not finite; where a whole mean is not, the trial has failed."""
    nan, rows = float("nan"), read_metrics(run)[0]
    some = [row | ({"loss": nan, "skipped": 1.0} if step == 2 else {"skipped": 0.0}) for step, row in enumerate(rows)]
    monkeypatch.setattr(trial, "read_metrics", lambda run: (some, None))
    kept = [row["loss"] for row in rows[:2] + rows[3:5]]
    assert actor_of(run, "loss")._measured()[0] == {"step": 5, "metric": pytest.approx(sum(kept) / 4)}
    some[5:] = [row | {"loss": nan, "skipped": 1.0} for row in some[5:]]
    assert [row["step"] for row in actor_of(run, "loss")._measured()] == [5]
    some[7] |= {"skipped": 0.0}
    actor = actor_of(run, "loss")
    assert [row["step"] for row in actor._measured()] == [5] and actor._stop.is_set()
    assert actor._end() == {"ended": "failed", "error": "the loss is not finite at step 10", "done": True}


def test_a_metric_that_is_none_fails_the_trial_with_a_sentence(run):
    actor = actor_of(run, "los")
    assert actor._measured() == [] and actor._stop.is_set()
    ended = actor._end()
    assert ended["ended"] == "failed" and "there is no metric 'los'; known: " in ended["error"]
    assert " loss," in ended["error"]


def test_data_without_truth_fail_the_trial_with_a_sentence(run, monkeypatch):
    actor = actor_of(run, "")
    actor._job = dataclasses.replace(actor._job, eval_data="s3://val")
    monkeypatch.setattr(trial, "read_evaluations", lambda *given, **more: [(5, Result({}, "s3://val", 8, (), ""))])
    assert actor._measured() == [] and actor._stop.is_set()
    assert "s3://val has no truth to score against" in actor._end()["error"]


def test_the_last_trial_waits_until_pruned_ones_have_saved(tmp_path, monkeypatch):
    """Tune would end their actors within seconds."""
    monkeypatch.setattr(tune, "LOOK_S", 0.01)
    asked = Asked("small", [], [], "", "", "loss", "min", True, 0)
    sweep = Sweep(Store(str(tmp_path)), asked, [Trial("000-a", {}), Trial("001-b", {})])
    first, last = (SimpleNamespace(config={"number": n}, last_result={}, is_finished=lambda: False) for n in (0, 1))
    watch, pruned = tune._Watch(sweep), Store(str(tmp_path / "000-a"))
    pruned.write("lease.json", b"{}")
    watch.on_trial_complete(1, [first, last], first)
    assert held(pruned) and pruned.exists("stop") and sweep.trials[0].state == "pruned"  # it is not waited for yet
    first.is_finished, last.last_result = lambda: True, {"ended": "finished"}
    threading.Timer(0.3, lambda: pruned.delete("lease.json")).start()
    began = time.monotonic()
    watch.on_trial_complete(2, [first, last], last)
    assert not held(pruned) and time.monotonic() - began > 0.2 and sweep.trials[1].state == "finished"
