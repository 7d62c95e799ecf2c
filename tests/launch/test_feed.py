"""What the driver hands on: to the real trackers in their offline modes, to one that fails, and as JSON lines."""

from __future__ import annotations

import dataclasses
import io
import json
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import SMALL, job

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.launch import feed
from vlmo_ray.launch.stop import Stopped
from vlmo_ray.launch.trackers import TRACKERS, check_trackers
from vlmo_ray.runs.events import console, tell
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.loop import train


class Seen:
    """A tracker that remembers what it was given."""

    def __init__(self):
        self.begun: list[tuple[str, str, str]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended: list[str] = []
        self.broken = False

    def begin(self, id, name, project, settings):
        assert settings["optim.peak_lr"] == SMALL.optim.peak_lr and settings["task.kind"] == "pretraining"
        self.begun.append((id, name, project))
        return "its id"

    def log(self, rows):
        if self.broken:
            raise ConnectionError("no route to the tracker")
        self.rows += [(step, dict(values)) for step, values in rows]

    def end(self, state):
        self.ended.append(state)


@pytest.fixture
def seen(monkeypatch) -> Seen:
    tracker = Seen()
    monkeypatch.setitem(TRACKERS, "seen", lambda: tracker)
    monkeypatch.setattr(feed, "LOOK_S", 0.01)
    return tracker


def _config(*trackers: str, **changes):
    return dataclasses.replace(SMALL, trackers=trackers, **changes)


def _ten_steps(scenes, run: Path, upto: int = 10) -> Store:
    from vlmo_ray.train.agree import Notice

    steps = iter(range(0, 100, 5))  # asked every five steps
    told = lambda: Notice.STOP if next(steps) >= upto else Notice.NONE  # noqa: E731
    train(job(scenes, run), notice=told)
    return Store(str(run))


def test_every_step_once_over_two_drivers(scenes, tmp_path, seen):
    run = Store(str(tmp_path))
    with pytest.raises(Stopped), feed.feeding(run, _config("seen")):
        _ten_steps(scenes, tmp_path, upto=5)
        raise Stopped("asked")
    assert [step for step, _ in seen.rows] == [1, 2, 3, 4, 5] and seen.ended == ["stopped"]
    with feed.feeding(run, _config("seen")):
        _ten_steps(scenes, tmp_path)
    assert seen.begun == [("", tmp_path.name, "small"), ("its id", tmp_path.name, "small")]
    assert seen.rows == [(int(row.pop("step")), row) for row in read_metrics(run)[0]] and seen.ended == [
        "stopped",
        "finished",
    ]
    with pytest.raises(ZeroDivisionError), feed.feeding(run, _config("seen")):
        _ = 1 / 0
    assert len(seen.rows) == 10 and seen.ended[-1] == "failed"


def test_evaluations_and_figures_that_are_not_finite(tmp_path, seen):
    run = Store(str(tmp_path))
    rows = [{"step": 1, "loss": 2.0, "itm": float("nan")}, {"step": 2, "loss": 1.0}]
    run.write("metrics/1.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    told = {"who": "worker", "event": "evaluation", "step": 1, "scores": {"accuracy": 0.5}}
    run.write("events/1-worker.jsonl", json.dumps(told).encode())
    for _ in range(2):
        with feed.feeding(run, _config("seen")):
            pass
    assert seen.rows == [(1, {"loss": 2.0, "evaluation/accuracy": 0.5}), (2, {"loss": 1.0})]


def test_steps_only_grow_whenever_an_evaluation_is_told(tmp_path, seen):
    """One that comes before the figures of its step, and one that comes long after them."""
    run = Store(str(tmp_path))

    def evaluated(number: int, step: int) -> None:
        told = {"who": "worker", "event": "evaluation", "step": step, "scores": {"accuracy": step / 10}}
        run.write(f"events/{number}-worker.jsonl", json.dumps(told).encode())

    def until(count: int) -> None:
        while len(seen.rows) < count:
            time.sleep(0.01)

    with feed.feeding(run, _config("seen")):
        _write(run, range(1, 3))
        until(2)
        evaluated(1, 4)
        time.sleep(0.1)
        assert len(seen.rows) == 2
        _write(run, range(3, 7))
        until(6)
        evaluated(2, 5)
        until(7)
        _write(run, range(7, 8))
    steps = [step for step, _ in seen.rows]
    assert steps == sorted(steps) == [1, 2, 3, 4, 5, 6, 6, 7]
    scores = {step: values["evaluation/accuracy"] for step, values in seen.rows if "evaluation/accuracy" in values}
    assert scores == {4: 0.4, 6: 0.5}


def test_a_tracker_that_fails_is_told_once_and_gets_everything_later(tmp_path, seen, monkeypatch):
    run, seen.broken = Store(str(tmp_path)), True
    monkeypatch.setattr("sys.stdout", out := io.StringIO())  # of capsys, what a thread prints meanwhile can be lost
    with feed.feeding(run, _config("seen")):
        run.write("metrics/1.jsonl", b'{"step": 1, "loss": 2.0}\n')
        while "no route" not in out.getvalue():
            time.sleep(0.01)
        run.write("metrics/1.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        time.sleep(0.1)
        seen.broken = False
    assert seen.rows == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]
    assert out.getvalue().count("seen failed, and is tried again: ConnectionError: no route") == 1
    seen.broken = True
    with feed.feeding(run, _config("seen")):
        run.write("metrics/2.jsonl", b'{"step": 3, "loss": 0.5}\n')
    assert "seen lacks the last figures, which the run has: ConnectionError: no route" in out.getvalue()


def test_unknown_and_missing_trackers_are_named(monkeypatch):
    with pytest.raises(UserError, match="there is no 'mlfow'; known: mlflow, trackio, wandb"):
        check_trackers(["mlfow"])
    monkeypatch.setitem(TRACKERS, "no_such_package", Seen)
    with pytest.raises(UserError, match=r"pip install 'vlmo-ray\[no_such_package\]'"):
        check_trackers(["no_such_package"])


def test_json_lines(scenes, tmp_path, capsys):
    """The workers' own console is silent: the driver shows what they store, and the means of their figures."""
    with console("none"):
        run = _ten_steps(scenes, tmp_path)
    assert capsys.readouterr().out == ""
    done = {name: run.read(name) for folder in ("metrics/", "events/") for name in run.list(folder)}
    for name in done:
        run.delete(name)
    run.write("metrics/1.jsonl", b'{"step": 99, "loss": 1.0}\n')  # of an earlier start: not told again
    with console("json"), feed.feeding(run, _config(log_json=True)):
        tell("start", "the driver's own")
        for name, content in done.items():
            run.write(name, content)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"time", "event", "message"} <= set(entry) for entry in told)
    events = [entry["event"] for entry in told]
    assert events[0] == "start" and sorted(events) == sorted(["start", *["step"] * 2, *["checkpoint"] * 3])
    steps = [entry for entry in told if entry["event"] == "step"]
    losses = [row["loss"] for row in read_metrics(run)[0]][:10]  # without that of the earlier start
    assert [entry["step"] for entry in steps] == [5, 10]
    assert [entry["loss"] for entry in steps] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def _write(run: Store, steps: range) -> None:
    rows = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in steps]
    run.write(f"metrics/{steps[0]}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _twice(tmp_path, name: str) -> None:
    """A run that is stopped after 3 steps, and ends with step 6."""
    run = Store(str(tmp_path / "run-7"))
    for steps in (range(1, 4), range(4, 7)):
        _write(run, steps)
        with feed.feeding(run, _config(name)):
            pass


@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    _twice(tmp_path, "mlflow")
    client = MlflowClient(f"file://{tmp_path}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-7", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / step) for step in range(1, 7)]
    assert run.data.params["optim.peak_lr"] == "0.001"


@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    assert "trackio" not in sys.modules  # it looks at its variables only when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _twice(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("small*.db")
    with sqlite3.connect(file) as db:
        rows = db.execute("select step, metrics from metrics where run_name = 'run-7' order by step").fetchall()
    assert [(step, json.loads(values)["loss"]) for step, values in rows] == [(k, 1 / k) for k in range(1, 7)]


def _records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 kB, in which a piece has checksum, length and kind."""
    at, record = 7, b""  # after the file's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block, which has no room for a header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _twice(tmp_path, "wandb")
    found, ids, until = {}, set(), time.monotonic() + 20
    while len(found) < 6 and time.monotonic() < until:  # a process of wandb's own writes the files
        for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
            for data in _records(file.read_bytes()):
                record = Record.FromString(data)
                ids |= {record.run.run_id} - {""}
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if "loss" in values:
                    found[values["_step"]] = values["loss"]
    assert found == {step: 1 / step for step in range(1, 7)} and len(ids) == 1
