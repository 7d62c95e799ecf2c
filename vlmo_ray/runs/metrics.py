"""Metrics of a run: one JSON line per step, TensorBoard events, and lines on the console.

Object storage cannot append, so the log consists of segments, `metrics/<start in ns>.jsonl`. One process writes each of
them as a whole, in a thread, and closes it at its checkpoints or when it is long; `read_metrics` joins them. A step
that was repeated after a failure is in two segments, and the later one counts.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from vlmo_ray.data.store import Store
from vlmo_ray.progress import clock
from vlmo_ray.runs.events import show

_FLUSH_S = 5.0  # seconds between rewrites of an open segment
_SEGMENT_STEPS = 500  # of a segment, some 300 kB


class Meters:
    """Collects the metrics of each step on rank 0. `store` is that of the run.

    Writes happen in one thread, so slow storage holds up no step. Their errors are raised by the next call.
    """

    def __init__(self, store: Store, total_steps: int, log_every: int, shown: Sequence[str] = ()):
        self.store, self.total_steps, self.log_every = store, total_steps, log_every
        self.shown = shown  # metrics on the console line, beside the loss
        self.recent: list[dict[str, float]] = []
        self._writer = ThreadPoolExecutor(1, "metrics")
        self._writing: deque[Future[None]] = deque()
        self._open()

    def _open(self) -> None:
        self.figures: list[tuple[float, dict[str, float]]] = []  # (time of arrival, metrics)
        self.start = time.time_ns()
        self.flushed = time.monotonic()

    def add(self, figures: dict[str, float]) -> None:
        """`figures` holds at least step (number of steps done), loss, samples_per_s, data_wait and step_s."""
        step = int(figures["step"])
        self.figures.append((time.time(), figures))
        self.recent.append(figures)
        if step % self.log_every == 0 or step == self.total_steps:
            self._print(step)
        self._raise()
        if len(self.figures) >= _SEGMENT_STEPS:
            self.later(self._write, self.close_segment())
        elif not self._writing and time.monotonic() - self.flushed > _FLUSH_S:
            self.later(self._write, self._segment())
            self.flushed = time.monotonic()

    def later(self, write: Callable[..., None], *given: Any) -> None:
        """Calls `write` in the thread, after what is to be written already."""
        self._writing.append(self._writer.submit(write, *given))

    def _print(self, step: int) -> None:
        figures = mean(self.recent)
        skipped = sum(f.get("skipped", 0) > 0 for f in self.recent)
        left = figures["step_s"] * (self.total_steps - step)
        terms = "  ".join(f"{name} {figures[name]:.3f}" for name in self.shown)
        masked = sum(f["masked_rows"] for f in self.recent)
        line = (
            f"step {step}/{self.total_steps}  loss {figures['loss']:.3f}  {terms}  "
            f"{figures['samples_per_s']:.0f} samples/s  data wait {figures['data_wait']:.0%}  {clock(left)} left"
            + (f"  ({masked:.0f} rows masked)" if masked else "")
            + (f"  ({skipped} steps skipped)" if skipped else "")
        )
        show("step", line, **figures | {"step": step})
        self.recent.clear()

    def _raise(self) -> None:
        """Raises the error of a write that has ended."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()

    def _segment(self) -> Callable[[], dict[str, bytes]]:
        """Makes the files of the open segment as it is now: name -> content."""
        start, figures = self.start, list(self.figures)
        return lambda: _files(start, figures)

    def _write(self, files: Callable[[], dict[str, bytes]]) -> None:
        for name, content in files().items():
            self.store.write(name, content)

    def close_segment(self) -> Callable[[], dict[str, bytes]]:
        """Closes the open segment; the caller has to write the files that the result gives when it is called.

        That call waits for writes that are under way: one of the same segment would overwrite the files.
        """
        files, writing = self._segment(), list(self._writing)
        self._open()

        def settled() -> dict[str, bytes]:
            wait(writing)
            return files()

        return settled

    def close(self) -> None:
        """Writes what is left, and ends the thread; raises the first error of what was to be written."""
        self.later(self._write, self.close_segment())
        self._writer.shutdown()
        self._raise()


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means of the figures of steps, without those that were skipped, whose figures are not finite."""
    counted = [row for row in rows if not row.get("skipped")] or rows
    return {key: sum(row[key] for row in counted) / len(counted) for key in counted[0]}


def _files(start: int, figures: list[tuple[float, dict[str, float]]]) -> dict[str, bytes]:
    if not figures:
        return {}
    lines = "".join(json.dumps(values) + "\n" for _, values in figures)
    return {f"metrics/{start}.jsonl": lines.encode(), f"tensorboard/events.out.tfevents.{start}": _events(figures)}


def _events(figures: list[tuple[float, dict[str, float]]]) -> bytes:
    """A TensorBoard event file, made in memory: TensorBoard's writer needs a disk and a thread that can fail unseen."""
    # protobuf creates these classes at import
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = io.BytesIO()
    writer = RecordWriter(out)
    writer.write(Event(wall_time=figures[0][0], file_version="brain.Event:2").SerializeToString())
    for when, values in figures:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag != "step"]
        event = Event(wall_time=when, step=int(values["step"]), summary=Summary(value=scalars))
        writer.write(event.SerializeToString())
    return out.getvalue()


def _segments(store: Store) -> list[str]:
    """Names of the segments, in the order in which they were begun."""
    return sorted(store.list("metrics/"), key=lambda name: int(Path(name).stem))


def newest_first(store: Store) -> Iterator[list[dict[str, float]]]:
    """The rows of each segment, the newest segment first. A step that was done twice comes twice."""
    for name in reversed(_segments(store)):
        if rows := [json.loads(line) for line in store.read(name).splitlines()]:
            yield rows


def last_step(store: Store) -> int:
    """The newest step that the run's metrics tell of, done or not kept; 0 without any."""
    segments = _segments(store)
    lines = store.read(segments[-1]).splitlines() if segments else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def read_metrics(store: Store) -> tuple[list[dict[str, float]], list[int]]:
    """(metrics of every step, repeated steps). A step that was repeated twice is listed twice."""
    by_step: dict[int, dict[str, float]] = {}
    repeated = []
    for name in _segments(store):
        for line in store.read(name).decode().splitlines():
            figures = json.loads(line)
            if figures["step"] in by_step:
                repeated.append(int(figures["step"]))
            by_step[figures["step"]] = figures
    return [by_step[step] for step in sorted(by_step)], sorted(repeated)
