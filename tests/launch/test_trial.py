"""What a trial tells Ray Tune of its run."""

import dataclasses
import threading

import pytest
from small_run import SMALL, job

from vlmo_ray.data.store import Store
from vlmo_ray.launch.sweep import Trial
from vlmo_ray.launch.trial import Job, TrialActor
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


def test_a_metric_that_is_none_fails_the_trial_with_a_sentence(run):
    actor = actor_of(run, "los")
    assert actor._measured() == [] and actor._stop.is_set()
    ended = actor._end()
    assert ended["ended"] == "failed" and "there is no metric 'los'; known: " in ended["error"]
    assert " loss," in ended["error"]
