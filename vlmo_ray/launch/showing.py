"""A run on a terminal: its newest figures in a block that is drawn again, and what happens to it as lines above.

The driver follows what the workers store, as for `--log-json`: Ray would put a prefix on what they print, and a printed
line cannot be updated in place.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from vlmo_ray.config import Config
from vlmo_ray.data.store import Store
from vlmo_ray.progress import bar, drawn, draws
from vlmo_ray.runs.events import FOLDER as EVENTS
from vlmo_ray.runs.events import show
from vlmo_ray.runs.follow import Following
from vlmo_ray.runs.metrics import mean

# figures with a place of their own, or that are not of the task
_APART = frozenset(
    ("step", "samples", "samples_per_s", "data_wait", "step_s", "workers", "masked_rows", "skipped", "exchanged_bytes")
)


class Block:
    """What is new of a run from now on; `done` is the step of its newest checkpoint."""

    def __init__(self, run: Store, config: Config, done: int):
        self._total, self._step, self._saved, self._at = config.total_steps, done, done, 0.0
        self._rows: deque[dict[str, float]] = deque(maxlen=config.log_every)
        self._masked = self._skipped = 0.0
        self._evaluation = ""
        impatient = dataclasses.replace(run, retry_timeout_s=0.0)  # what cannot be read now is in the next look
        self._metrics, self._events = Following(impatient, "metrics/"), Following(impatient, EVENTS)
        for following in (self._metrics, self._events):
            following.skip(run)

    def look(self) -> Group:
        """Shows the events that are new, and draws the block with the figures of the last `log_every` steps."""
        for row in self._metrics.new():
            self._rows.append(row)
            self._step, self._at = int(row["step"]), time.monotonic()
            self._masked += row["masked_rows"]
            self._skipped += row["skipped"]
        for entry in self._events.new():
            if entry["who"] == "worker":
                show(entry["event"], entry["message"])
                if entry["event"] == "checkpoint":
                    self._saved = entry["step"]
                elif entry["event"] == "evaluation":
                    self._evaluation = entry["message"]
        return self._drawn()

    def _drawn(self) -> Group:
        figures = mean(self._rows) if self._rows else {}
        lines, left = [], math.nan
        if figures:
            left = max(0.0, figures["step_s"] * (self._total - self._step) - (time.monotonic() - self._at))
            terms = [Text(f"{name} {value:.4g}") for name, value in figures.items() if name not in _APART]
            speed = f"{figures['samples_per_s']:.0f} samples/s  data wait {figures['data_wait']:.0%}"
            lines += [Columns(terms, padding=(0, 2)), f"{speed}  {self._rows[-1]['workers']:.0f} workers"]
        kept = [f"checkpoint at step {self._saved:,}"] * bool(self._saved)
        kept += [f"{self._masked:,.0f} rows masked"] * bool(self._masked)
        kept += [f"{self._skipped:,.0f} steps skipped"] * bool(self._skipped)
        lines += ["  ".join(kept)] * bool(kept) + [self._evaluation] * bool(self._evaluation)
        return Group(bar("step", self._step, self._total, left), *lines)


@contextmanager
def showing(run: Store, config: Config, done: int) -> Iterator[bool]:
    """Inside the block the run is shown on the terminal, if there is one and `log_json` is not asked for.

    Gives whether it is: then its first worker need not print.
    """
    if config.log_json or not draws():  # then nothing is read of the store either
        yield False
        return
    with drawn(Block(run, config, done).look) as is_drawn:
        yield is_drawn
