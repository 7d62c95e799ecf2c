"""What the driver hands on while its run lasts: figures to experiment trackers, and all as JSON lines to its console.

A thread follows what the workers store. A tracker that fails stops no run: it is told, and tried again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vlmo_ray.config import Config
from vlmo_ray.data.store import Store
from vlmo_ray.launch.stop import Stopped
from vlmo_ray.launch.trackers import TRACKERS, Rows, State, Tracker
from vlmo_ray.overrides import flat, to_dict
from vlmo_ray.runs.events import FOLDER as EVENTS
from vlmo_ray.runs.events import show, tell
from vlmo_ray.runs.follow import Following
from vlmo_ray.runs.metrics import mean

LOOK_S = 5.0  # between two looks at the run
_CLOSE_S = 60.0
_SKEW_NS = 3_600_000_000_000  # what was begun so long before the newest is looked at again: clocks of nodes differ


class Sink(Protocol):
    """Takes what is new; raises if it cannot, and is given the same again."""

    what: str

    def look(self) -> None: ...

    def end(self, state: State) -> None: ...


class _Console:
    """The workers' events, and every `log_every` steps the mean figures, as JSON lines."""

    what = "the JSON lines"

    def __init__(self, run: Store, config: Config):
        self._config, self._rows = config, []
        self._metrics, self._events = Following(run, "metrics/"), Following(run, EVENTS)
        for following in (self._metrics, self._events):
            following.skip()

    def look(self) -> None:
        """In the order of steps; an event comes after the figures of its step."""
        lines: list[tuple[int, int, dict[str, Any]]] = []
        step, total = 0, self._config.total_steps
        for row in self._metrics.new():
            self._rows.append(row)
            step = int(row["step"])
            if step % self._config.log_every == 0 or step == total:
                facts = {"total_steps": total} | mean(self._rows) | {"step": step}
                lines.append((step, 0, {"event": "step", "sentence": f"step {step}/{total}"} | facts))
                self._rows.clear()
        for entry in self._events.new():
            if entry["who"] == "worker":
                lines.append((entry.get("step", step), 1, _spread(entry)))
        for _, _, line in sorted(lines, key=lambda found: found[:2]):
            show(**line)

    def end(self, state: State) -> None:
        self.look()


class _Tracked:
    """A tracker, and in `trackers/<name>.json` of the run how far it has come."""

    def __init__(self, run: Store, config: Config, what: str, tracker: Tracker):
        self.what, self._run, self._config, self._tracker = what, run, config, tracker
        self._object, self._begun = f"trackers/{what}.json", False
        self._state = {"id": "", "step": 0, "sent": 0, "evaluated": 0, "after": 0}
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._evaluations: list[tuple[int, dict[str, float]]] = []  # of steps whose figures are not there yet

    def _begin(self) -> None:
        if self._run.exists(self._object):
            self._state |= json.loads(self._run.read(self._object))
        name, settings = self._run.uri.rstrip("/").rpartition("/")[2], dict(flat(to_dict(self._config)))
        self._state["id"] = self._tracker.begin(self._state["id"], name, self._config.name, settings)
        self._metrics = Following(self._run, "metrics/", self._state["after"] - _SKEW_NS)
        self._events = Following(self._run, EVENTS)
        self._begun = True

    def look(self) -> None:
        if not self._begun:
            self._begin()
        state, rows, sent = self._state, self._waiting, self._state["sent"]
        for row in self._metrics.new():
            if (step := int(row.pop("step"))) > state["step"]:
                state["step"] = step
                rows.append((step, {key: value for key, value in row.items() if math.isfinite(value)}))
        for entry in self._events.new():
            if entry["event"] == "evaluation" and entry["step"] > state["evaluated"]:
                state["evaluated"] = entry["step"]
                scores = {f"evaluation/{key}": value for key, value in entry["scores"].items()}
                self._evaluations.append((entry["step"], scores))
        # a tracker's steps only grow: an evaluation waits for the figures of its step, and one that is late is of now
        due = [(step, scores) for step, scores in self._evaluations if step <= state["step"]]
        rows += [(max(step, sent), scores) for step, scores in due]
        del self._evaluations[: len(due)]
        if rows:
            self._tracker.log(_joined(rows))
            rows.clear()
            state["sent"] = state["step"]
        state["after"] = self._metrics.begun
        self._run.write(self._object, json.dumps(state).encode())

    def end(self, state: State) -> None:
        self.look()
        self._tracker.end(state)


def _spread(entry: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `show` for what another process told."""
    return {"sentence": entry["message"]} | {key: entry[key] for key in entry if key not in ("message", "who")}


def _joined(rows: Rows) -> Rows:
    """One row for each step, in the order of steps."""
    found: dict[int, dict[str, float]] = {}
    for step, values in rows:
        found.setdefault(step, {}).update(values)
    return sorted(found.items())


@contextmanager
def feeding(run: Store, config: Config) -> Iterator[None]:
    """Inside the block a thread hands on what is stored of `run`, if `config` asks for it."""
    impatient = dataclasses.replace(run, retry_timeout_s=0.0)
    sinks: list[Sink] = [_Tracked(impatient, config, name, TRACKERS[name]()) for name in config.trackers]
    if config.log_json:
        sinks.append(_Console(run, config))
    if not sinks:
        yield
        return
    over = threading.Event()
    how: State = "finished"

    def follow() -> None:
        failing: set[str] = set()
        while not over.wait(LOOK_S):
            for sink in sinks:
                _try(sink, sink.look, failing)
        for sink in sinks:
            _try(sink, functools.partial(sink.end, how))

    thread = threading.Thread(target=follow, name="feed", daemon=True)
    thread.start()
    try:
        yield
    except Stopped:
        how = "stopped"
        raise
    except BaseException:
        how = "failed"
        raise
    finally:
        over.set()
        thread.join(_CLOSE_S)
        if thread.is_alive():
            tell("tracker", f"trackers have not taken the last figures within {_CLOSE_S:.0f} s; the run has them")


def _try(sink: Sink, act: Callable[[], None], failing: set[str] | None = None) -> None:
    """Acts; what goes wrong is told once in a row, and at the end, without `failing`."""
    try:
        act()
    except Exception as error:  # of a tracker, which can be any
        what = f"{type(error).__name__}: {error}"
        if failing is None:
            tell("tracker", f"{sink.what} lacks the last figures, which the run has: {what}")
        elif sink.what not in failing:
            tell("tracker", f"{sink.what} failed, and is tried again: {what}")
            failing.add(sink.what)
    else:
        (failing or set()).discard(sink.what)
