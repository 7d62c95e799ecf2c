"""How far long work has come: a bar with the time left on a terminal, nothing elsewhere. It goes to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int, size: Callable[[T], int], done: int = 0) -> Iterator[T]:
    """The items, as they come; `size` says how much of `total` each is, and `done` how much there was before."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            shown.advance(task, size(item))
