"""How a stage of a preparation counts what is done, without Ray; `test_prepare_engine.py` has it on Ray."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlmo_ray.data.prepare import stage
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError


class _DataSet:
    """What `run_stage` uses of Ray Data; blocks end in reverse order."""

    def __init__(self, items: list[dict], **_):
        self.items, self.context = items, SimpleNamespace(enable_progress_bars=True)

    def map_batches(self, do, **_):
        self.do = do
        return self

    def iter_rows(self):
        assert not self.context.enable_progress_bars
        for item in reversed(self.items):
            found = self.do({"unit": np.array([item["unit"]], object)})
            yield {name: value[0] for name, value in found.items()}


@pytest.fixture
def counted(monkeypatch) -> list:
    """(what, total, done before, [sizes]) of each stage."""
    import ray
    import ray.data

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1 << 40}}])
    monkeypatch.setattr(ray.data, "from_items", _DataSet)
    found = []

    def tracked(items, what, total, size, done):
        found.append((what, total, done, sizes := []))
        for item in items:
            yield item
            sizes.append(size(item))

    monkeypatch.setattr(stage, "tracked", tracked)
    return found


def test_units_count_by_their_size_and_those_of_before_too(tmp_path, counted):
    store = Store(str(tmp_path))

    def work(unit: str) -> dict:
        if unit == "b" and not broken.pop():
            raise UserError("b is bad")
        return {"name": unit}

    broken, arguments = [True, False], (store, "one", ["a", "b", "c"])
    with pytest.raises(UserError, match="b is bad"):
        stage.run_stage(*arguments, work, 1, "MB", [1.0, 2.0, 4.0])
    stage.run_stage(*arguments, work, 1, "MB", [1.0, 2.0, 4.0])
    stage.run_stage(*arguments, work, 1, "MB", [1.0, 2.0, 4.0])  # nothing is left
    assert counted == [("MB", 7.0, 0.0, [4.0]), ("MB", 7.0, 4.0, [2.0, 1.0])]
    assert list(stage.results(store, "one", 3)) == [{"name": name} for name in "abc"]
