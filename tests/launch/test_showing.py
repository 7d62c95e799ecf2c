"""A run, or a sweep, on a terminal: its block, its events above it; and that elsewhere nothing changes."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import pytest
from rich.console import Console, RenderableType
from small_run import SMALL, job
from terminal import Terminal, attach

from vlmo_ray import progress
from vlmo_ray.data.store import Store
from vlmo_ray.launch import tune
from vlmo_ray.launch.showing import Block, showing
from vlmo_ray.launch.sweep import Asked, Sweep, Trial
from vlmo_ray.runs.events import console, tell
from vlmo_ray.runs.metrics import Meters
from vlmo_ray.train.loop import train

_ROW = {
    "samples": 8, "lr": 1e-3, "loss": 2.0, "itc": 1.5, "itm": 0.5, "negative_similarity": 0.25, "masked_rows": 1.0,
    "grad_norm": 3.0, "skipped": 0.0, "samples_per_s": 812.4, "data_wait": 0.031, "step_s": 61.0, "workers": 2,
}  # fmt: skip


def _write(run: Store, steps: range, **changes: float) -> None:
    rows = [{"step": step} | _ROW | changes for step in steps]
    run.write(f"metrics/{steps[0]}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _told(run: Store, number: int, event: str, message: str, who: str = "worker", **facts) -> None:
    entry = {"who": who, "event": event, "message": message} | facts
    run.write(f"events/{number}-{who}.jsonl", (json.dumps(entry) + "\n").encode())


def _lines(block: Block) -> list[str]:
    return _text(block.look())


def _text(drawing: RenderableType) -> list[str]:
    shown = Console(file=io.StringIO(), force_terminal=False, width=80, highlight=False)
    shown.print(drawing)
    assert isinstance(shown.file, io.StringIO)
    return [line.rstrip() for line in shown.file.getvalue().splitlines()]


def test_what_the_block_says(tmp_path, capsys):
    run = Store(str(tmp_path))
    _write(run, range(1, 4))  # of an earlier driver
    _told(run, 1, "checkpoint", "an old one", step=3)
    block = Block(run, SMALL, 3)
    first, kept = _lines(block)
    assert first.startswith("step 3/10 ━") and first.endswith(" ? left") and kept == "checkpoint at step 3"
    _write(run, range(4, 6))
    _write(run, range(6, 8), loss=3.0, skipped=0.0)
    _told(run, 2, "checkpoint", "checkpoint of step 6: stored in 0.1 s", step=6)
    _told(run, 3, "evaluation", "evaluation at step 7: accuracy 0.5", step=7)
    _told(run, 4, "workers", "of the driver, which has printed it", who="driver")
    first, *figures, speed, kept, evaluated = _lines(block)
    assert first.startswith("step 7/10 ━") and first.endswith(" 3:03 left")
    assert " ".join(" ".join(figures).split()) == (
        "lr 0.001 loss 2.5 itc 1.5 itm 0.5 negative_similarity 0.25 grad_norm 3"
    )
    assert speed == "812 samples/s  data wait 3%  2 workers"
    assert (kept, evaluated) == ("checkpoint at step 6  4 rows masked", "evaluation at step 7: accuracy 0.5")
    assert capsys.readouterr().out == "checkpoint of step 6: stored in 0.1 s\nevaluation at step 7: accuracy 0.5\n"


def test_a_real_run(scenes, tmp_path, monkeypatch):
    """What a worker stored appears while the run is shown: its events, and one block in the end."""
    with console("none"):
        train(job(scenes, tmp_path / "before"))
    stored, run = Store(str(tmp_path / "before")), Store(str(tmp_path / "run"))
    terminal = attach(monkeypatch)
    monkeypatch.setattr(progress, "_DRAW_S", 0.05)
    with showing(run, SMALL, 0) as drawn:
        assert drawn
        tell("workers", "starting 1 workers")
        for name in stored.list("metrics/") + stored.list("events/"):
            run.write(name, stored.read(name))
    shown = terminal.screen()
    assert shown[0] == "starting 1 workers"
    assert [line.split(":")[0] for line in shown[1:4]] == [f"checkpoint of step {step}" for step in (4, 8, 10)]
    assert shown[4].startswith("step 10/10 ━") and shown[4].endswith(" 0:00 left")
    text = "\n".join(shown[5:])
    assert all(name in text for name in ("loss ", "itc ", "itm ", "mlm ", "samples/s", "1 workers"))
    assert shown[-1] == "checkpoint at step 10" and "step 10/10" not in text
    assert sys.stdout is terminal


@pytest.mark.parametrize("setting", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"log_json": "1"}], ids=str)
def test_elsewhere_the_run_is_not_followed_and_its_lines_are_plain(tmp_path, monkeypatch, setting):
    attach(monkeypatch)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    shown = Terminal() if setting else io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr(Block, "__init__", lambda *given: pytest.fail("looked"))
    run = Store(str(tmp_path))
    with showing(run, dataclasses.replace(SMALL, log_json="log_json" in setting), 0) as drawn:
        assert not drawn
        tell("workers", "starting 2 workers", workers=2)
        meters = Meters(run, 1000, 2, ("itc", "itm"))
        for step in (1, 2, 3, 4):
            meters.add(_ROW | {"step": step, "masked_rows": float(step == 2), "skipped": float(step == 3)})
        meters.close()
    written = shown.getvalue()
    assert not setting or max(map(len, written.splitlines())) <= 80
    assert written.replace("\n  ", "  ") == (
        "starting 2 workers\n"
        "step 2/1000  loss 2.000  itc 1.500  itm 0.500  812 samples/s  data wait 3%  16:54:38 left  (1 rows masked)\n"
        "step 4/1000  loss 2.000  itc 1.500  itm 0.500  812 samples/s  data wait 3%  16:52:36 left  (1 steps skipped)\n"
    )


def test_a_sweep(monkeypatch, tmp_path):
    """The table of its trials comes above the block, whole."""
    terminal = attach(monkeypatch)
    trials = [Trial("000-a", {"optim.peak_lr": 1e-3}, "finished", 10, 0.25), Trial("001-b", {"optim.peak_lr": 1e-4})]
    asked = Asked("small", [], [], "", "", "accuracy", "max", False, 0)
    sweep = Sweep(Store(str(tmp_path)), asked, trials)
    block = tune._block(sweep, 4, 1000)
    with progress.drawn(block):
        trials[1].step, trials[1].metric = 1500, 0.5
        tune._show(sweep)
    *table, bar, running, best = terminal.screen()
    assert any("peak_lr" in line for line in table) and any("best" in line for line in table)
    assert bar.startswith("trials 1/4 ━") and bar.endswith(" ? left")
    assert (running, best) == ("trial 001: step 1,500/1,000  metric 0.5", "best so far: trial 000  metric 0.25")
    trials[1].state = "pruned"
    bar, best = _text(block())
    assert bar.startswith("trials 2/4 ━") and bar.endswith(" 0:00 left") and best.startswith("best so far: trial 000")
