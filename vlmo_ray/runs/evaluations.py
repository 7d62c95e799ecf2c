"""Results of evaluations, which a run keeps in `evaluations/<step>-<hash of the data set's URI>.json`.

Where something else was measured than what the run was trained for, the name ends in "-<task>", and with options in a
hash of them too. Predictions are in a Parquet file of the same name: id, prediction, score and, where known, truth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.tasks.task import Columns, Evaluation, Score

_FOLDER = "evaluations"
PREPARED = "prepare.json"  # what `vlmo prepare` leaves in a data set


@dataclass(frozen=True)
class Result:
    """Scores on one data set."""

    scores: dict[str, Score]
    data: str  # URI of the data set
    num_rows: int  # that were scored
    problems: tuple[str, ...] = ()  # address and reason of rows that were left out
    remark: str = ""
    task: str = ""  # what was measured, and its options, if not what the run was trained for
    predictions: pa.Table | None = field(default=None, compare=False, repr=False)
    # makes the file for the benchmark's server from ids and predictions
    submission: Callable[[list[str], list[str]], bytes] | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """The data set, and what was measured on it if the run was not trained for that."""
        return self.data + (f" ({self.task})" if self.task else "")

    def __getitem__(self, name: str) -> float:
        return self.scores[name].value


def scored(evaluation: Evaluation, blocks: Iterable[Columns], data: str) -> Result:
    """Scores the valid rows of `blocks`, which also have the columns `valid` and `problem`.

    Raises UserError if no row is valid.
    """
    problems: list[str] = []
    predicted: list[pa.Table] = []
    num_valid = 0

    def valid_rows() -> Iterator[Columns]:
        nonlocal num_valid
        for block in blocks:
            valid = block["valid"].astype(bool)
            problems.extend(block["problem"][~valid])
            num_valid += int(valid.sum())
            if valid.any():
                rows = {name: column[valid] for name, column in block.items() if name != "problem"}
                _check_numbers(rows, data)
                if found := evaluation.predictions(rows):
                    predicted.append(pa.table(found))
                yield rows
        if not num_valid:
            why = f"no row of {data} can be read; the first: {problems[0]}" if problems else f"{data} has no rows"
            raise UserError(why)

    scores = evaluation.score(valid_rows())
    predictions = pa.concat_tables(predicted) if predicted else None
    remark = evaluation.remark(scores)
    found = Result(scores, data, num_valid, tuple(problems), remark)
    return dataclasses.replace(found, predictions=predictions, submission=evaluation.submission)


def _check_numbers(rows: Columns, data: str) -> None:
    """Raises UserError if what a model says of a row is not a number: no comparison with that means anything."""
    for name, column in rows.items():
        if np.issubdtype(column.dtype, np.floating):
            bad = np.isnan(column).reshape(len(column), -1).any(axis=1)
            if bad.any():
                raise UserError(
                    f"{name} is NaN for {bad.sum():,} rows of {data}, the first with the id "
                    f"{rows['id'][bad.argmax()]!r}: the model's activations have overflowed. Evaluate an earlier "
                    "checkpoint, or train with a lower learning rate"
                )


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def keep(run: Store, step: int, result: Result) -> None:
    """Writes a result into the run. It replaces an earlier one of the same data set, step, task and options."""
    kind, options, _ = result.task.partition(" ")
    name = f"{_FOLDER}/{step:08d}-{_short_hash(result.data)}{kind and f'-{kind}'}"
    if options:
        name += f"-{_short_hash(result.task)}"
    if result.predictions is not None:
        with run.create(f"{name}.parquet") as file:
            pq.write_table(result.predictions, file, compression="zstd")
    content = {"step": step} | as_dict(result)
    run.write(f"{name}.json", json.dumps(content, indent=1, default=np.generic.item).encode())


def as_dict(result: Result) -> dict:
    """The result for JSON, without predictions."""
    content = dataclasses.asdict(dataclasses.replace(result, predictions=None, submission=None))
    del content["predictions"], content["submission"]
    return content


def submission(result: Result) -> bytes:
    """The file that the benchmark's server takes, of all rows of the data set.

    Raises UserError if rows are missing or doubled, and for a task without such a file: servers refuse half a file.
    """
    if result.predictions is None or result.submission is None:
        raise UserError("this task has no predictions to submit")
    if result.problems:
        raise UserError(f"{len(result.problems):,} rows are missing in the file, the first: {result.problems[0]}")
    prepared = Store(result.data)
    if prepared.exists(PREPARED):
        counts = json.loads(prepared.read(PREPARED)).get("counts") or {"dropped": {"unfinished": 1}}
        if lost := sum(counts["dropped"].values()):
            reasons = "; ".join(f"{n:,}: {reason}" for reason, n in counts["dropped"].items())
            raise UserError(f"{result.data} lacks {lost:,} records that were dropped when it was prepared ({reasons})")
    ids, predicted = (result.predictions[name].to_pylist() for name in ("id", "prediction"))
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{result.data} has {twice[0]!r} and {len(twice) - 1:,} other ids twice")
    return result.submission(ids, predicted)


def keep_in_run(path: str, result: Result, step: int | None = None) -> None:
    """Keeps a result in the run at `path`, at the `step` of the weights, or where that is not known of the newest
    checkpoint; does nothing if `path` is no run."""
    if not path.startswith("s3://") and not Path(path).is_dir():
        return
    run = Store(path)
    if state := Checkpoints(run).newest():
        keep(run, state.step if step is None else step, result)


def read_evaluations(run: Store, after: int = -1, *, every_task: bool = False) -> list[tuple[int, Result]]:
    """(step, result) of every evaluation of a step after `after` that the run keeps, in the order of steps: of what it
    was trained for, or of `every_task`."""
    found = []
    for name in run.list(f"{_FOLDER}/"):
        if not name.endswith(".json") or int(Path(name).name.partition("-")[0]) <= after:
            continue
        content = json.loads(run.read(name))
        scores = {key: Score(**score) for key, score in content["scores"].items()}
        problems, remark, task = tuple(content["problems"]), content.get("remark", ""), content.get("task", "")
        result = Result(scores, content["data"], content["num_rows"], problems, remark, task)
        if every_task or not result.task:
            found.append((content["step"], result))
    return found


def line(result: Result, most: int = 4) -> str:
    """The first metrics in one line for the console."""
    if not result.scores:
        return "predictions alone: the data set has no truth to score against"
    shown = list(result.scores.items())[:most]
    return "  ".join(f"{name} {cell(score.value, score)}" for name, score in shown)


def table(result: Result, title: str) -> Table:
    """All metrics, with what chance would give."""
    out = Table("metric", title=f"{title}: {result.num_rows:,} rows")
    for head in ("chance", "reached", "count"):
        out.add_column(head, justify="right")
    for name, score in result.scores.items():
        chance = "" if score.chance is None else cell(score.chance, score)
        out.add_row(name, chance, cell(score.value, score), f"{score.count:,}")
    return out


def cell(value: float, score: Score) -> str:
    """A value of this score, as people read it."""
    return f"{value:.1%}" if score.is_share else f"{value:.4g}"
