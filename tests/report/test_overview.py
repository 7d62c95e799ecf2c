"""All runs of a storage."""

import dataclasses
import io
import json

from rich.console import Console
from small_run import SMALL, job

from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store
from vlmo_ray.report.overview import read_runs, table
from vlmo_ray.report.page import _scores
from vlmo_ray.runs.evaluations import Result, keep
from vlmo_ray.runs.load import describe
from vlmo_ray.tasks.task import Score
from vlmo_ray.train.loop import train


def test_runs_of_a_storage(scenes, tmp_path, vlmo):
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    describe(Store(str(tmp_path / "begun")), SMALL, PAIRS)
    spec = job(scenes, tmp_path / "done", SMALL, evaluate_every=10)
    assert train(dataclasses.replace(spec, eval_data=scenes)).step == 10
    Store(str(tmp_path / "another")).write("task.json", b"{}")
    for task in ("matching", "grounding layer=2"):
        keep(Store(str(tmp_path / "done")), 11, Result({"other": Score(0.25, None, 3)}, scenes, 3, task=task))
    runs, problems = read_runs(str(tmp_path))
    assert len(problems) == 1 and "another/task.json is not of a run" in problems[0]
    assert [(facts.name, facts.state, facts.curves.last) for facts in runs] == [
        ("begun", "silent", 0),
        ("done", "finished", 10),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(runs))
    shown = console.export_text()
    assert "10/10" in shown and "text_retrieval" in shown and max(map(len, shown.splitlines())) <= 80
    run = vlmo("runs", str(tmp_path), "--json-output")
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [one["state"] for one in found] == ["silent", "finished"] and found[1]["checkpoint"] == 10
    assert found[1]["evaluation"]["text_retrieval_r@1"] == runs[1].newest()[0][1]["text_retrieval_r@1"]
    [done] = [facts for facts in runs if facts.name == "done"]
    newest = [result.task for _, result in done.newest(3)]
    assert newest[2] == "" and sorted(newest[:2]) == ["grounding layer=2", "matching"]
    assert {place for *_, place in _scores(done)} == {scenes, f"{scenes} (matching)", f"{scenes} (grounding layer=2)"}
    assert vlmo("runs", str(tmp_path / "no run")).returncode == 2
