"""What a run's store tells of it. Nothing is written, and nothing here grows with the length of the run but one byte
a step."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlmo_ray.config import Config
from vlmo_ray.data.schema import Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import differences
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.runs import lease
from vlmo_ray.runs.checkpoints import stored_checkpoints
from vlmo_ray.runs.evaluations import Result, read_evaluations
from vlmo_ray.runs.events import FOLDER as EVENTS
from vlmo_ray.runs.follow import Following
from vlmo_ray.runs.load import described
from vlmo_ray.runs.masked import masked_rows
from vlmo_ray.runs.metrics import newest_first
from vlmo_ray.train.memory import on_meta

POINTS = 1500  # of a curve
_RECENT = 100  # steps that the present speed is the mean of
_NAMED = 5  # addresses of masked rows by reason

State = Literal["finished", "running", "stopped", "failed", "silent"]


@dataclass
class Curves:
    """Every metric over the steps that count: of steps that were done twice, the second time."""

    width: int = 1  # steps of a point
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [n], the last of each point
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [n], seen by then
    mean: dict[str, np.ndarray] = field(default_factory=dict)  # each [n], NaN where no step has the metric
    low: dict[str, np.ndarray] = field(default_factory=dict)
    high: dict[str, np.ndarray] = field(default_factory=dict)
    repeated: list[tuple[int, int]] = field(default_factory=list)  # first and last step of each span done again
    workers: list[tuple[int, int]] = field(default_factory=list)  # (first step, how many) at each change
    recent: dict[str, float] = field(default_factory=dict)  # means of the last steps

    @property
    def last(self) -> int:
        """The newest step."""
        return int(self.steps[-1]) if len(self.steps) else 0

    def samples_at(self, step: float) -> float:
        """Rows seen by a step."""
        if not len(self.steps):
            return 0.0
        return float(np.interp(step, [0, *self.steps], [0, *self.samples]))


@dataclass(frozen=True)
class Reason:
    """Why rows were masked."""

    count: int
    addresses: tuple[str, ...]  # of the first few


@dataclass
class Facts:
    """A run, as it was when it was read."""

    name: str
    uri: str
    config: Config
    schema: Schema | None  # of its data; None: not known
    curves: Curves
    events: list[dict[str, Any]]  # in the order of time; "at": seconds since 1970
    evaluations: list[tuple[int, Result]]
    checkpoints: dict[int, int]  # step -> bytes
    masked: dict[str, Reason]  # by reason, the most frequent first
    leased: bool  # whether a program has shown within the last minute that it trains the run
    read_at: float  # seconds since 1970

    def newest(self, count: int = 1) -> list[tuple[int, Result]]:
        """(step, result) of the newest evaluations, the newest last. Those of what the run is trained for count as
        newer than all others."""
        return sorted(self.evaluations, key=lambda each: (not each[1].task, each[0]))[-count:]

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    @property
    def state(self) -> State:
        """How the run is. "silent": it is not over, and no program shows that it goes on."""
        if self.curves.last >= self.total_steps and self.total_steps in self.checkpoints:
            return "finished"
        if self.leased:
            return "running"
        told = [event["event"] for event in self.events if event["event"] in ("start", "stopped", "failed")]
        if told and told[-1] == "stopped":
            return "stopped"
        return "failed" if told and told[-1] == "failed" else "silent"

    @functools.cached_property
    def chances(self) -> list[tuple[int, dict[str, float]]]:
        """(last step, what guessing costs by term) of each phase; none where the task cannot be built here."""
        labels = {"label", "answers"}
        try:
            task = on_meta(self.config, self.schema)
        except UserError:  # a tokenizer that this machine has not
            return []
        known = self.schema is not None or not labels & set(task.encoder().fields)
        ends = itertools.accumulate(phase.steps for phase in self.config.phases)
        each = (task.chance(phase.global_batch) if known else {} for phase in self.config.phases)
        return list(zip(ends, each, strict=True))

    @property
    def changed(self) -> list[str] | None:
        """How the config differs from the recipe of its name; None if there is no such recipe."""
        if self.config.name not in RECIPES:
            return None
        return [str(difference) for difference in differences(recipe(self.config.name), self.config)]

    @property
    def heard_at(self) -> float | None:
        """When the run last told anything."""
        return self.events[-1]["at"] if self.events else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the present speed; None before the first."""
        each = self.curves.recent.get("step_s")
        return None if each is None else each * (self.total_steps - self.curves.last)

    def address_of(self, what: Literal["data", "eval_data"]) -> str:
        """Where the run has said that its data are; "" if it has not."""
        starts = [event for event in self.events if event["event"] == "start"]
        return next((event[what] for event in reversed(starts) if event.get(what)), "")


def read_facts(uri: str, points: int = POINTS, brief: bool = False) -> Facts:
    """Reads the run at `uri`, a folder or `s3://bucket/prefix`; `brief`: of its curves only the newest segment, and
    not what was masked. Raises UserError if there is none."""
    run = open_store(uri)
    found = described(run)
    if found is None:
        raise UserError(f"{run.uri} holds no run: it has no task.json. Name a run, STORAGE/NAME, that has begun")
    name = run.uri.rstrip("/").rpartition("/")[2]
    now = time.time()
    return Facts(
        name=name,
        uri=run.uri,
        config=found[0],
        schema=found[1],
        curves=read_curves(run, points, brief),
        events=_timed(Following(run, EVENTS).new()),
        evaluations=read_evaluations(run, every_task=True),
        checkpoints=stored_checkpoints(run),
        masked={} if brief else _reasons(run),
        leased=now - lease.renewed_at(run) < lease.LAPSE_S,
        read_at=now,
    )


def read_curves(run: Store, points: int = POINTS, brief: bool = False) -> Curves:
    """Every metric in at most `points` points, each with the mean and the extremes of its steps; `brief`: of the
    newest segment alone."""
    found, seen, repeated = Curves(), np.zeros(0, bool), []
    changes: list[tuple[int, int]] = []
    recent: list[dict[str, float]] = []
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    last = bins = 0
    for rows in itertools.islice(newest_first(run), 1 if brief else None):
        steps = np.array([int(row["step"]) for row in rows])
        if not last:
            last = int(steps[-1])
            found.width = -(-last // points)
            bins = -(-last // found.width)
            seen = np.zeros(last + 1, bool)
            found.steps = np.minimum(np.arange(1, bins + 1) * found.width, last)
            found.samples = np.zeros(bins)
        # a step above the newest was done by a start that kept nothing of it
        counted = (steps <= last) & ~seen[np.minimum(steps, last)]
        repeated += steps[~counted].tolist()
        rows = [row for row, counts_ in zip(rows, counted, strict=True) if counts_]
        steps = steps[counted]
        if not rows:
            continue
        seen[steps] = True
        recent = (rows + recent)[-_RECENT:]
        changes += [(int(step), int(row["workers"])) for step, row in zip(steps, rows, strict=True) if "workers" in row]
        at = (steps - 1) // found.width
        first, span = int(at.min()), int(at.max()) - int(at.min()) + 1
        at, here = at - first, slice(first, first + span)
        np.maximum.at(found.samples[here], at, [row["samples"] for row in rows])
        for name in {name for row in rows for name in row} - {"step", "samples", "workers"}:
            values = np.array([row.get(name, math.nan) for row in rows], float)
            finite = np.isfinite(values)
            if name not in sums:
                sums[name], counts[name] = np.zeros(bins), np.zeros(bins)
                found.low[name], found.high[name] = np.full(bins, np.inf), np.full(bins, -np.inf)
            sums[name][here] += np.bincount(at[finite], values[finite], minlength=span)
            counts[name][here] += np.bincount(at[finite], minlength=span)
            np.minimum.at(found.low[name][here], at[finite], values[finite])
            np.maximum.at(found.high[name][here], at[finite], values[finite])
        changes = _changes(changes)
    for name, total in sums.items():
        empty = counts[name] == 0
        found.mean[name] = np.where(empty, math.nan, total / np.maximum(counts[name], 1))
        found.low[name][empty] = found.high[name][empty] = math.nan
    found.samples = np.maximum.accumulate(found.samples)
    found.repeated = _spans(sorted({step for step in repeated if step <= last}))
    found.workers = changes
    found.recent = _means(recent)
    return found


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each metric over the rows where it is finite; metrics that nowhere are, are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if math.isfinite(row.get(name, math.nan))] for name in names}
    return {name: float(np.mean(some)) for name, some in values.items() if some}


def _changes(numbers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that differ from the one before, in the order of steps."""
    kept: list[tuple[int, int]] = []
    for step, number in sorted(numbers):
        if not kept or kept[-1][1] != number:
            kept.append((step, number))
    return kept


def _spans(steps: list[int]) -> list[tuple[int, int]]:
    """Consecutive steps as (first, last)."""
    spans: list[tuple[int, int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans


def _timed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = [event | {"at": datetime.datetime.fromisoformat(event["time"]).timestamp()} for event in events]
    return sorted(timed, key=lambda event: event["at"])


def _reasons(run: Store) -> dict[str, Reason]:
    counts: Counter[str] = Counter()
    named: dict[str, list[str]] = defaultdict(list)
    for row in masked_rows(run):
        address, _, reason = row["problem"].partition(": ")
        counts[reason] += 1
        if len(named[reason]) < _NAMED:
            named[reason].append(address)
    return {reason: Reason(count, tuple(named[reason])) for reason, count in counts.most_common()}
