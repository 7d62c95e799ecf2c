"""Figures of a run, in samples: one JSON line a step, TensorBoard events, and lines a person can follow.

Object storage cannot append, so the log is a row of segments, `metrics/<start in ns>.jsonl`, each written
whole by one process and closed at its checkpoints; `read_metrics` joins them. A step that was repeated after a
failure stands in two segments: the later one is the run's.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

from vlmo_ray.data.store import Store

_FLUSH_S = 5.0  # how often an open segment is written again


class Meters:
    """Collects a step's figures on rank 0. `store` is the run's folder or prefix."""

    def __init__(self, store: Store, total_steps: int, log_every: int):
        self.store, self.total_steps, self.log_every = store, total_steps, log_every
        self.recent: list[dict[str, float]] = []
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.lines: list[str] = []
        self.name = f"metrics/{time.time_ns()}.jsonl"
        self.events = tempfile.TemporaryDirectory(prefix="vlmo-events-")
        self.writer = SummaryWriter(self.events.name)
        self.flushed = time.monotonic()

    def add(self, figures: dict[str, float]) -> None:
        """`figures` holds at least step (done steps), loss, pairs_per_s, step_s."""
        step = int(figures["step"])
        self.lines.append(json.dumps(figures))
        for name, value in figures.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        self.recent.append(figures)
        printed = step % self.log_every == 0 or step == self.total_steps
        if printed or time.monotonic() - self.flushed > _FLUSH_S:
            self.flush()  # before the line: a step that was told of is in the log, whatever comes next
        if printed:
            self._print(step)

    def _print(self, step: int) -> None:
        mean = {k: sum(f[k] for f in self.recent) / len(self.recent) for k in self.recent[0]}
        left = mean["step_s"] * (self.total_steps - step)
        terms = "  ".join(f"{name} {mean[name]:.3f}" for name in ("itc", "itm", "mlm"))
        masked = sum(f["masked_pairs"] for f in self.recent)
        print(
            f"step {step}/{self.total_steps}  loss {mean['loss']:.3f}  {terms}  "
            f"{mean['pairs_per_s']:.0f} pairs/s  data wait {mean['data_wait']:.0%}  {_clock(left)} left"
            + (f"  ({masked:.0f} pairs masked)" if masked else ""),
            flush=True,
        )
        self.recent.clear()

    def flush(self) -> None:
        """Writes the open segment and its events to the run."""
        if self.lines:
            self.store.write(self.name, ("\n".join(self.lines) + "\n").encode())
            self.writer.flush()
            for file in Path(self.events.name).iterdir():
                self.store.write(f"tensorboard/{file.name}", file.read_bytes())
        self.flushed = time.monotonic()

    def close_segment(self) -> None:
        """Called at a checkpoint: what is written so far is not touched again."""
        self.close()
        self._open()

    def close(self) -> None:
        self.flush()
        self.writer.close()
        self.events.cleanup()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def read_metrics(store: Store) -> tuple[list[dict[str, float]], list[int]]:
    """The run's figures by step, and the steps that were done more than once (each as often as repeated)."""
    by_step: dict[int, dict[str, float]] = {}
    repeated = []
    for name in sorted(store.list("metrics/"), key=lambda n: int(Path(n).stem)):
        for line in store.read(name).decode().splitlines():
            figures = json.loads(line)
            if figures["step"] in by_step:
                repeated.append(int(figures["step"]))
            by_step[figures["step"]] = figures
    return [by_step[step] for step in sorted(by_step)], sorted(repeated)
