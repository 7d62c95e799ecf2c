"""How far long work has come: a bar with the time left on a terminal, a line now and then elsewhere.

A terminal of `TERM=dumb` counts as elsewhere, and so does one with `NO_COLOR`, for people who want plain lines.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

T = TypeVar("T")
_LINE_S = 30.0  # between two lines of a `tracked`
_DRAW_S = 1.0  # between two drawings of a `drawn`
_CLOSE_S = 10.0


class Screen(Console):
    """Lines that other libraries print are shown as they are. The cursor stays visible: a process that is killed could
    not bring it back."""

    def __init__(self, file: TextIO):
        super().__init__(file=file, force_terminal=file.isatty(), markup=False, emoji=False, highlight=False)
        self.draws = self.is_interactive and not self.is_dumb_terminal and not self.no_color

    def show_cursor(self, show: bool = True) -> bool:
        return False


def tracked(items: Iterable[T], what: str, total: float, size: Callable[[T], float], done: float = 0) -> Iterator[T]:
    """The items, as they come; `size` says how much of `total` each is, and `done` how much there was before.

    It is told on stderr. What is printed meanwhile comes above the bar, but not what goes to a file.
    """
    screen = Screen(sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Progress(
        *columns,
        console=screen,
        expand=True,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not screen.draws,
    )
    with shown:
        task = shown.add_task(what, total=total, completed=done)  # pyright: ignore[reportArgumentType]  # floats will do
        began = told = time.monotonic()
        before = done
        for item in items:
            yield item
            done += size(item)
            shown.update(task, completed=done)
            if not screen.draws and (now := time.monotonic()) - told > _LINE_S:
                told, left = now, (now - began) * (total - done) / (done - before or math.nan)
                print(f"{what}: {done:,.0f}/{total:,.0f}, {clock(left)} left", file=sys.stderr, flush=True)


def draws() -> bool:
    """Whether `drawn` draws here: on a terminal, and in the main thread."""
    return Screen(sys.stdout).draws and threading.current_thread() is threading.main_thread()


@contextmanager
def drawn(look: Callable[[], RenderableType]) -> Iterator[bool]:
    """Inside the block a thread draws what `look` returns, anew every second, at the bottom of the terminal of stdout.

    What is printed meanwhile comes above it. Gives whether it is drawn: without a terminal, and outside the main
    thread, nothing is. An error of `look` is told once, and what was drawn last stays.
    """
    if not draws():
        yield False
        return
    screen = Screen(sys.stdout)
    live, over = Live(console=screen, auto_refresh=False, redirect_stderr=sys.stderr.isatty()), threading.Event()
    # One lock: a signal handler may print while this thread is printing, and the drawing thread must not hold the other
    live._lock = screen._lock  # pyright: ignore[reportPrivateUsage]

    def draw() -> None:
        told = last = False
        while not last:
            last = over.is_set()
            try:
                live.update(look(), refresh=True)
            except Exception as error:  # a run does not fail for what is drawn of it
                if not told:
                    print(f"what is drawn here is not up to date: {type(error).__name__}: {error}", flush=True)
                told = True
            over.wait(_DRAW_S)

    thread = threading.Thread(target=draw, name="drawing", daemon=True)
    with live:
        thread.start()
        try:
            yield True
        finally:
            over.set()
            thread.join(_CLOSE_S)


def bar(what: str, done: int, total: int, left_s: float) -> Table:
    """A line to draw, `left_s` not finite where it is not known."""
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_row(f"{what} {done:,}/{total:,}", ProgressBar(total, done), f"{clock(left_s)} left")
    return line


def clock(seconds: float) -> str:
    """For example 1:02:03 or 2:03; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
