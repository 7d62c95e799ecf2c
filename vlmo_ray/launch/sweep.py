"""A sweep in its store: `sweep.json` says what was asked for, and what became of every trial.

It is the only record of a sweep, written whole before a trial begins and after it ends. A sweep that goes on replays
it: trials that have ended answer from their runs, and the others continue from their checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from vlmo_ray.config import Config
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.space import Value, settings_of

_FILE = "sweep.json"
LEAVING = "leaving"  # an object in the sweep's store: trials that have not begun stay so
State = Literal["running", "finished", "pruned", "failed"]


@dataclass
class Trial:
    """One run of the sweep; its folder in the sweep's store has the same name."""

    name: str
    params: dict[str, Value]  # field of the config -> value
    state: State = "running"
    step: int = 0  # of the newest measurement
    metric: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Asked:
    """What a sweep is of; a sweep that goes on must be of the same."""

    recipe: str
    settings: list[str]
    space: list[str]
    data: str  # fingerprint of the data set
    eval_data: str
    metric: str
    mode: Literal["min", "max"]
    pruning: bool
    seed: int


@dataclass
class Sweep:
    """The sweep in the store `store`."""

    store: Store
    asked: Asked
    trials: list[Trial] = field(default_factory=list)
    leaving: bool = False  # no more trials are begun
    lost: str = ""  # why the sweep is another driver's by now: it must not be written any more

    @classmethod
    def mode(cls, uri: str, metric: str) -> Literal["min", "max"] | None:
        """What is better in the sweep of this metric that is there; None if there is none."""
        store = Store(uri)
        asked = read_sweep(store).asked if store.exists(_FILE) else None
        return asked.mode if asked and asked.metric == metric else None

    @classmethod
    def open(cls, store: Store, asked: Asked) -> Sweep:
        """A new sweep, or the one that is there. Raises UserError if that is of something else."""
        store.delete(LEAVING)
        found = read_sweep(store) if store.exists(_FILE) else None
        if found is None:
            return cls(store, asked)
        now, before = dataclasses.asdict(asked), dataclasses.asdict(found.asked)
        if changed := [f"{name}: {before[name]!r} -> {now[name]!r}" for name in now if now[name] != before[name]]:
            raise UserError(f"{store.uri} is a sweep of something else; give another --name. {'; '.join(changed)}")
        return found

    def draw(self, params: dict[str, Value]) -> Trial:
        """Notes a new trial before it begins."""
        shown = "-".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in params.items())
        self.trials.append(Trial(f"{len(self.trials):03d}-{re.sub('[^A-Za-z0-9_.=+-]', '_', shown)[:80]}", params))
        self.save()
        return self.trials[-1]

    def lose(self, reason: str) -> None:
        """Another driver has taken the sweep over. Called from another thread."""
        self.lost, self.leaving = reason, True

    def save(self) -> None:
        """Raises UserError if the sweep is another driver's."""
        if self.lost:
            raise UserError(self.lost)
        best = self.best
        content = {
            "format": "vlmo_ray sweep",
            "version": 1,
            **dataclasses.asdict(self.asked),
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "best": best and {"name": best.name, "params": best.params, "metric": best.metric},
        }
        self.store.write(_FILE, json.dumps(content, indent=1).encode())

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best metric at its end. Trials whose metric is not finite are ignored."""
        sign = 1 if self.asked.mode == "max" else -1
        finished = [
            (sign * trial.metric, trial)
            for trial in self.trials
            if trial.state == "finished" and trial.metric is not None and math.isfinite(trial.metric)
        ]
        return max(finished, key=lambda each: each[0], default=(0.0, None))[1]

    def table(self) -> Table:
        best = self.best
        out = Table("trial", title=f"sweep of {self.asked.recipe}: {self.store.uri}", title_justify="left")
        for path in self.trials[0].params if self.trials else ():
            out.add_column(path.rpartition(".")[2], justify="right")
        for head in ("step", self.asked.metric or "metric"):
            out.add_column(head, justify="right")
        out.add_column("state")
        for number, trial in enumerate(self.trials):
            metric = "" if trial.metric is None else f"{trial.metric:.4g}"
            state = "best" if trial is best else trial.state
            shown = [f"{number:03d}", *map(_short, trial.params.values()), str(trial.step), metric, state]
            out.add_row(*shown, style="bold" if trial is best else None)
        return out

    def picture(self) -> bytes:
        """The metric over the first searched field, as PNG; pruned trials are crosses."""
        import io

        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), dpi=150)
        axes = figure.subplots()
        path = next(iter(self.trials[0].params))
        for state, mark in (("finished", "o"), ("pruned", "x"), ("running", "+")):
            some = [(t.params[path], t.metric) for t in self.trials if t.state == state and t.metric is not None]
            if some:
                axes.plot([x for x, _ in some], [y for _, y in some], mark, label=f"{state} ({len(some)})")
        numbers = [float(value) for trial in self.trials if not isinstance(value := trial.params[path], str)]
        if numbers and min(numbers) > 0 and max(numbers) > 10 * min(numbers):
            axes.set_xscale("log")
        axes.set(xlabel=path, ylabel=self.asked.metric or "metric", title=self.asked.recipe)
        axes.legend()
        figure.tight_layout()
        out = io.BytesIO()
        figure.savefig(out, format="png")
        return out.getvalue()


def read_sweep(store: Store) -> Sweep:
    """Raises UserError if there is none, or if it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(store.read(_FILE))
        if content["version"] != 1:
            raise UserError(
                f"{store.address(_FILE)} has version {content['version']}, this program reads 1; use a newer vlmo_ray"
            )
        asked = Asked(**{name: content[name] for name in (f.name for f in dataclasses.fields(Asked))})
        return Sweep(store, asked, [Trial(**trial) for trial in content["trials"]])
    except FileNotFoundError as error:
        raise UserError(
            f"{store.uri} holds no sweep: it has no {_FILE}; name the folder that `vlmo tune` wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{store.address(_FILE)} cannot be read ({error!r}); restore it from a copy, or give another --name"
        ) from error


def best_settings(uri: str, config: Config) -> list[str]:
    """What the best trial of the sweep at `uri` set, as `--set` takes it."""
    sweep = read_sweep(open_store(uri))
    if sweep.asked.recipe != config.name:
        raise UserError(f"{uri} is a sweep of {sweep.asked.recipe}, not of {config.name}; name one of this recipe")
    if sweep.best is None:
        raise UserError(f"no trial of the sweep {uri} has finished yet; run `vlmo tune` again, it goes on")
    return [*sweep.asked.settings, *settings_of(sweep.best.params)]


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
