"""What a run keeps of its evaluations."""

import numpy as np
import pytest

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.evaluations import Result, keep, read_evaluations, scored
from vlmo_ray.tasks.task import Evaluation, Score


def result(value: float, task: str = "", data: str = "s3://val") -> Result:
    return Result({"accuracy": Score(value, 0.5, 9)}, data, 9, task=task)


def test_results_of_several_tasks_lie_side_by_side(tmp_path):
    run = Store(str(tmp_path))
    kept = [result(0.1), result(0.2, "matching"), result(0.3, "retrieval folds=5"), result(0.4, "retrieval folds=3")]
    for each in [*kept, result(0.5)]:  # the last replaces the first
        keep(run, 7, each)
    assert read_evaluations(run) == [(7, result(0.5))]
    found = [each for _, each in read_evaluations(run, every_task=True)]
    assert sorted(found, key=lambda each: each["accuracy"]) == [*kept[1:], result(0.5)]
    assert read_evaluations(run, after=7, every_task=True) == []


class Means(Evaluation):
    def score(self, blocks):
        return {"mean": Score(float(np.concatenate([block["value"] for block in blocks]).mean()), None, 3)}


def test_a_row_whose_value_is_not_a_number_is_named():
    block = {
        "id": np.array(["a", "b", "c"], object), "valid": np.array([True, False, True]),
        "problem": np.array(["", "gone", ""], object), "value": np.array([1.0, np.nan, 2.0]),
    }  # fmt: skip
    assert scored(Means(), [block], "s3://val")["mean"] == 1.5  # a row that is left out may have anything
    with pytest.raises(UserError, match="value is NaN for 1 rows of s3://val, the first with the id 'c'"):
        scored(Means(), [block | {"value": np.array([[1.0, 2], [0, 0], [0, np.nan]])}], "s3://val")
