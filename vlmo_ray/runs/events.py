"""What happens to a run: a sentence each on the console, and a line of JSON in `events/<start in ns>-<who>.jsonl`.

The driver and the first worker keep what they tell. An object cannot be appended to, so each of them rewrites its own,
in a thread: slow storage holds up nothing, and an event that cannot be stored stops no run.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import queue
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

FOLDER = "events/"
_LINES = 500  # of an object
_CLOSE_S = 10.0


def tell(event: str, sentence: str, **facts: Any) -> None:
    """Something happened: `event` names its kind in a word, `facts` are for programs. Also in signal handlers."""
    entry = show(event, sentence, **facts)
    if _keeper is not None:
        _keeper.entries.put(entry)


def note(event: str, sentence: str, **facts: Any) -> None:
    """As `tell`, where the sentence comes on the console anyway."""
    with console("json" if shows_json() else "none"):
        tell(event, sentence, **facts)


def show(event: str, sentence: str, **facts: Any) -> dict[str, Any]:
    """Tells it on the console alone, in the style of this process. Returns what a JSON line says."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    entry = {"time": now, "event": event, "message": sentence} | facts
    if _style == "text":
        print(_fitted(sentence), flush=True)
    elif _style == "json":
        print(json.dumps(entry, default=str), flush=True)
    return entry


def _fitted(text: str) -> str:
    """On a terminal, with lines that are too long for it broken between words."""
    if sys.stdout is None or not sys.stdout.isatty():  # None: a process without one, for which print does nothing
        return text
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def shows_json() -> bool:
    """Whether the console of this process is JSON lines."""
    return _style == "json"


@contextmanager
def console(style: Literal["text", "json", "none"]) -> Iterator[None]:
    """How this process shows events inside the block: sentences, JSON lines, or not at all."""
    global _style
    before, _style = _style, style
    try:
        yield
    finally:
        _style = before


@contextmanager
def keeping(run: Store, who: Literal["driver", "worker"]) -> Iterator[None]:
    """Inside the block this process keeps what it tells in the run."""
    global _keeper
    before, _keeper = _keeper, _Keeper(run, who)
    try:
        yield
    finally:
        keeper, _keeper = _keeper, before
        keeper.close()


class _Keeper:
    def __init__(self, run: Store, who: str):
        self._run = dataclasses.replace(run, retry_timeout_s=0.0)  # what fails is in the next write too
        self._who = who
        self.entries: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        lines, name, told, over = [], "", False, False
        while not over:
            waiting = [self.entries.get()]
            while not self.entries.empty():
                waiting.append(self.entries.get())
            over = None in waiting
            told_now = ({"who": self._who} | entry for entry in waiting if entry is not None)
            lines += [json.dumps(entry, default=str) + "\n" for entry in told_now]
            if not lines:
                continue
            name = name or f"{FOLDER}{time.time_ns()}-{self._who}.jsonl"
            try:
                self._run.write(name, "".join(lines).encode())
            except (UserError, OSError) as error:
                if not told:
                    print(f"what happens is not stored for now, but told here: {error}", flush=True)
                told = True
                if _style == "none":  # those who would have shown it cannot read it
                    print(*(entry["message"] for entry in waiting if entry is not None), sep="\n", flush=True)
                continue
            told = False
            if len(lines) >= _LINES:
                lines, name = [], ""

    def close(self) -> None:
        self.entries.put(None)
        self._thread.join(_CLOSE_S)


_style: Literal["text", "json", "none"] = "text"
_keeper: _Keeper | None = None
