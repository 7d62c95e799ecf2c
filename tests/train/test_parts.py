"""The small parts of training: parameter groups, learning rate, meters."""

import itertools
import json
import threading
import time

import pytest
import torch

from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes import recipe
from vlmo_ray.runs import metrics as metrics_module
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


FIGURES = {"loss": 1.0, "itc": 1.0, "itm": 1.0, "mlm": 1.0, "samples_per_s": 5.0, "data_wait": 0.1, "step_s": 1.0}


def test_meters_write_segments_and_a_repeated_step_counts_once(tmp_path, capsys):
    store = open_store(str(tmp_path), create=True)
    first = Meters(store, 6, 2, ("itc", "itm", "mlm"))
    for step in (1, 2, 3):
        first.add(FIGURES | {"step": step, "masked_rows": 0.0})
        if step == 2:
            for name, content in first.close_segment()().items():
                store.write(name, content)
    first.close()
    second = Meters(store, 6, 2, ("itc", "itm", "mlm"))
    for step in (3, 4, 5, 6):
        second.add(FIGURES | {"step": step, "loss": 2.0, "masked_rows": 1.0})
    second.close()
    metrics, repeated = read_metrics(store)
    assert [(m["step"], m["loss"]) for m in metrics] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert repeated == [3]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["2/6", "4/6", "6/6"]
    assert "0:02 left" in printed[1] and "(2 rows masked)" in printed[1] and "masked" not in printed[0]
    assert all(json.loads(line) for name in store.list("metrics/") for line in store.read(name).splitlines())


class Blocked(threading.Event):
    """A store that answers only once it is set; `written` are the writes by name."""

    def __init__(self):
        super().__init__()
        self.written: list[str] = []

    def write(self, name: str, content: bytes) -> None:
        assert self.wait(30)
        self.written.append(name)


def test_slow_storage_holds_up_no_step(monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_S", 0.0)
    monkeypatch.setattr(metrics_module, "_SEGMENT_STEPS", 4)
    store = Blocked()
    meters = Meters(store, 10, 100)
    for step in range(1, 11):  # would wait for ever
        meters.add(FIGURES | {"step": step, "masked_rows": 0.0})
    settled = meters.close_segment()
    threading.Timer(0.2, store.set).start()
    assert settled()  # waits for the write under way, lest it overwrite a closed segment
    assert store.is_set()
    meters.close()
    assert len({name for name in store.written if name.startswith("metrics/")}) == 2  # 4 and 4 steps; 2 are `settled`


def test_a_failed_write_is_told_even_if_later_ones_do_not_fail(monkeypatch):
    monkeypatch.setattr(metrics_module, "_SEGMENT_STEPS", 2)

    class Refusing(Blocked):
        def write(self, name: str, content: bytes) -> None:
            super().write(name, content)
            if len(self.written) == 1:
                raise UserError("s3://bucket/run: it is refused")

    store = Refusing()
    meters = Meters(store, 10, 100)
    for step in range(1, 7):
        meters.add(FIGURES | {"step": step, "masked_rows": 0.0})
    store.set()
    with pytest.raises(UserError, match="it is refused"):
        meters.close()
    assert len({name for name in store.written if name.startswith("metrics/")}) == 3  # the others are there


def test_a_failed_write_is_told(monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_S", 0.0)

    class Away:
        def write(self, name: str, content: bytes) -> None:
            raise UserError("s3://bucket/run: it is away")

    meters = Meters(Away(), 10, 100)
    with pytest.raises(UserError, match="it is away"):
        for step in range(1, 100):
            meters.add(FIGURES | {"step": step, "masked_rows": 0.0})
            time.sleep(0.01)
