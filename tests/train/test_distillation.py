"""Momentum distillation in a run: its teacher is in the checkpoints, and workers change nothing.

`test_step.py` has the values and gradients of a step against plain ones.
"""

import dataclasses

import numpy as np
import pytest
from small_run import SMALL, begin_at, job, train_on

from vlmo_ray.config import check
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train

CONFIG = dataclasses.replace(
    SMALL,
    task=PretrainingConfig(distill=0.4, distill_ramp=6),
    optim=dataclasses.replace(SMALL.optim, average_decay=0.9),
    precision="float64",
)


def curve(run) -> np.ndarray:
    return np.array([[m[k] for k in ("loss", "itc", "mlm", "grad_norm")] for m in read_metrics(Store(str(run)))[0]])


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    assert train(job(scenes, run, CONFIG)).step == 10
    return run


def test_a_resumed_run_equals_an_uninterrupted_one(scenes, alone, tmp_path):
    begin_at(tmp_path, alone / "checkpoint-00000004")
    assert train(job(scenes, tmp_path, CONFIG)).step == 10
    assert np.array_equal(curve(tmp_path), curve(alone)[4:])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_equal_one(scenes, alone, tmp_path, strategy):
    cluster = dataclasses.replace(CONFIG.cluster, strategy=strategy)
    outcomes = train_on(2, job(scenes, tmp_path, CONFIG, cluster=cluster, micro_batch=2))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    np.testing.assert_allclose(curve(tmp_path), curve(alone), rtol=1e-9)


def test_it_begins_after_the_first_step_and_changes_the_curve(scenes, alone, tmp_path):
    plain = dataclasses.replace(CONFIG, task=PretrainingConfig())
    assert train(job(scenes, tmp_path, plain)).step == 10
    found, wanted = curve(alone), curve(tmp_path)
    assert np.array_equal(found[0], wanted[0]) and not np.isclose(found[1:], wanted[1:]).all(axis=1).any()


def test_without_an_average_there_is_no_teacher():
    with pytest.raises(UserError, match=r"needs an average of the weights as its teacher: set optim\.average_decay"):
        check(dataclasses.replace(CONFIG, optim=SMALL.optim))
    task = dataclasses.replace(CONFIG.task, label_smoothing=0.1)
    with pytest.raises(UserError, match="only for the softmax contrast without"):
        check(dataclasses.replace(CONFIG, task=task))
