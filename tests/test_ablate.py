"""The ablations: every row can run, what the verdicts say, and two rows with two seeds, killed and gone on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scenes.questions import ANSWERS
from scenes.records import vqa_records

from vlmo_ray import ablate as module
from vlmo_ray.ablate import CLAIMS, ROWS, Budget, means, run_row, verdict, verdicts
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.errors import UserError

JOB = Path(__file__).parents[1] / "jobs" / "ablate.py"
VQA = Schema((Field("image", "image"), Field("text", "text"), Field("answers", "answers", ANSWERS)))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ablate")
    write_dataset(str(folder / "pairs"), records(1, 150, image_size=32))
    write_dataset(str(folder / "eval"), records(2, 40, image_size=32))
    for name, split in (("task", "train"), ("task-eval", "eval")):
        rows = [
            {key: row[key] for key in ("id", "image_id", "image", "text", "forbid")}
            | {"answers": [{"answer": row["answer"], "score": 1.0}]}
            for row in vqa_records(1, 80, split, image_size=32)
        ]
        write_dataset(str(folder / name), rows, schema=VQA)
    names = {"pairs": "pairs", "eval_pairs": "eval", "task_data": "task", "task_eval": "task-eval"}
    return {name: str(folder / place) for name, place in names.items()}


def test_every_row_has_a_config_that_runs(data, monkeypatch, tmp_path):
    """And differs from the others; nothing else does."""
    begun = []
    figures = {"text_retrieval_r@1": 0.5, "image_retrieval_r@1": 0.25, "accuracy": 0.75}
    monkeypatch.setattr(module, "_run", lambda config, *where: begun.append((config, where)) or figures)
    budget = Budget(**data, images="I", texts="T", storage=str(tmp_path), steps=40, stage_steps=20, task_steps=30)
    seen = {}
    for row in ROWS:
        begun.clear()
        found = run_row(row, 7, budget)
        assert found == {"text_retrieval_r@1": 0.5, "image_retrieval_r@1": 0.25, "fusion": 0.75}
        *stages, (pairs, where), (task, _) = begun
        assert len(stages) == len(row.stages) and where[0] == data["pairs"]
        assert [c.total_steps for c, _ in begun] == [20] * len(stages) + [40, 30] and {c.seed for c, _ in begun} == {7}
        inits = [c.init.rpartition("/")[2] for c, _ in begun]
        assert inits == ["", *row.stages, "pairs"][-len(begun) :] if row.stages else inits == ["", "pairs"]
        assert task.model.experts == pairs.model.experts and task.model.attention == pairs.model.attention
        plain = dataclasses.replace(pairs, init="")
        assert plain not in seen.values() or row.name == "images and texts"
        seen[row.name] = plain
    assert {name for _, better, worse in CLAIMS for name in (better, worse)} == set(seen)


def test_verdicts():
    assert verdict([0.50, 0.52, 0.54], [0.40, 0.41, 0.42]) == "holds (+11.0%)"
    assert verdict([0.40, 0.41, 0.42], [0.50, 0.52, 0.54]) == "reversed (-11.0%)"
    assert verdict([0.40, 0.50, 0.60], [0.42, 0.48, 0.54]) == "within the spread (+2.0%)"
    assert verdict([0.10, 0.50, 0.90], [0.05, 0.44, 0.86]) == "holds (+5.0%)"  # of equal seeds
    assert verdict([0.10, 0.50, 0.90], [0.05, 0.44, 0.70]) == "within the spread (+10.3%)"
    assert verdict([0.4], [0.3]) == "one seed says nothing"
    results = {
        name: [{"text_retrieval_r@1": a, "image_retrieval_r@1": a, "fusion": b} for a, b in values]
        for name, values in {"everything": [(0.5, 0.2), (0.6, 0.2)], "one network": [(0.1, 0.2), (0.1, 0.3)]}.items()
    }
    assert verdicts(results).row_count == 1 and means(results).row_count == 2
    assert list(means(results).columns[1].cells) == ["55.0% +- 7.1%", "10.0% +- 0.0%"]


def test_mistakes(data, tmp_path):
    with pytest.raises(UserError, match="there is no row 'no experts'; known: everything, images"):
        module.ablate(**data, storage=str(tmp_path), rows=("no experts",))
    with pytest.raises(UserError, match="seeds and steps must be at least 1"):
        module.ablate(**data, storage=str(tmp_path), seeds=0)
    with pytest.raises(UserError, match="is not a prepared data set"):
        module.ablate(**(data | {"task_eval": str(tmp_path)}), storage=str(tmp_path / "out"))


@pytest.mark.parametrize("change", ["steps", "task_steps", "data"])
def test_rows_of_another_budget_are_not_mixed(data, tmp_path, monkeypatch, change):
    monkeypatch.setattr(module, "ray_session", lambda: pytest.fail("went on"))
    asked = {"steps": 4, "stage_steps": 200, "task_steps": 300}
    with pytest.raises(pytest.fail.Exception):
        module.ablate(**data, storage=str(tmp_path), steps=4)
    assert json.loads((tmp_path / "asked.json").read_text()).items() >= asked.items()
    other = data | {"eval_pairs": data["pairs"]} if change == "data" else data | {"steps": 4} | {change: 7}
    with pytest.raises(UserError, match=rf"has ablations with other {change}; .* give another storage"):
        module.ablate(**({"steps": 4} | other), storage=str(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.full
def test_the_job_and_again(data, tmp_path):
    given = [word for name, uri in data.items() for word in (f"--{name.replace('_', '-')}", uri)]
    given += ["--storage", str(tmp_path), "--steps", "4", "--stage-steps", "3", "--task-steps", "3", "--seeds", "2"]
    given += ["--rows", "one network", "images and texts"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def run() -> str:
        done = subprocess.run([sys.executable, str(JOB), *given], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = run()
    assert "one network" in first and "images and texts" in first
    results = json.loads((tmp_path / "ablations.json").read_text())
    assert {name: len(found) for name, found in results.items()} == {"one network": 2, "images and texts": 2}
    assert {path.name for path in (tmp_path / "images-and-texts-2").iterdir() if path.is_dir()} == {
        "vision", "language", "pairs", "task"
    }  # fmt: skip
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    (tmp_path / "one-network-1" / "result.json").unlink()  # as if it had been killed before its end
    run()
    assert json.loads((tmp_path / "ablations.json").read_text()) == results
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert {path.relative_to(tmp_path).parts[0] for path in changed} <= {"one-network-1"}
