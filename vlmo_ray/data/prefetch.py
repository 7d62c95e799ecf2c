"""Threads that keep the items of iterators ready."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from vlmo_ray.errors import UserError

_CLOSE_S = 10.0  # how long `close` waits for threads

logger = logging.getLogger(__name__)


def user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` that a task raised, out of what Ray wraps it in; None if it raised something else."""
    found = None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # Ray's wrapper is an instance of the type it wraps, with a traceback as its message: take the innermost
        found = error if isinstance(error, UserError) else found
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__
    # Ray Data appends advice about its own settings to the message
    return found and type(found)(str(found).partition("\nFailed to apply UDF")[0])


class Prefetch(Iterator):
    """The items of an iterator, which a thread takes as fast as they come; an error of the iterator is raised here.

    `close` (or garbage collection) ends the thread after the item it is making, and closes a generator in it.
    Logs a warning for every minute spent waiting.
    """

    def __init__(self, source: Iterator):
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        # The thread has no reference to self, so that dropping the iterator ends it. It is a daemon, so that
        # a thread that waits for Ray does not keep the interpreter from ending.
        self._thread = threading.Thread(target=_fill, args=(source, self._queue, self._stop), name="data", daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        began, told = time.monotonic(), 0
        while not self._stop.is_set():
            try:
                kind, value = self._queue.get(timeout=1.0)
            except queue.Empty:
                waited = int(time.monotonic() - began)
                if waited // 60 > told:
                    told = waited // 60
                    logger.warning("no data for %d s: storage is slow, or no data task gets to run", waited)
                continue
            if kind == "item":
                return value
            self._stop.set()
            if kind == "error":
                raise value
        raise StopIteration

    def close(self, wait_s: float = _CLOSE_S) -> None:
        self._stop.set()
        self._thread.join(wait_s)

    def __del__(self):
        self._stop.set()


def _fill(source: Iterator, results: queue.SimpleQueue, stop: threading.Event) -> None:
    try:
        for item in source:
            if stop.is_set():
                break
            results.put(("item", item))
        results.put(("end", None))
    except BaseException as error:  # raised in the consumer, whatever it is
        results.put(("error", error))
    finally:
        if isinstance(source, Generator):
            source.close()


class Overlapped:
    """Iterators one after the other, each run to its end by a `Prefetch`; at most three are kept.

    `make(nearly_done)` makes the next iterator, which must call `nearly_done` once, before the last of its items. Then
    the iterator after it is made, or later if two are already waiting to be asked for.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Iterator]):
        self._make, self._lock = make, threading.Lock()
        self._kept: deque[Prefetch] = deque()
        self._made = self._asked_for = self._nearly_done = 0
        self._closed = False

    def next(self) -> Prefetch:
        """The next iterator; call this when the one before is used up."""
        with self._lock:
            assert not self._closed
            self._make_if_due()
            if self._asked_for:
                self._kept.popleft()
            self._asked_for += 1
            self._make_if_due()
            return self._kept[0]

    def close(self) -> None:
        with self._lock:
            self._closed = True
        until = time.monotonic() + _CLOSE_S
        for prefetch in self._kept:
            prefetch.close(0)  # tells all threads before it waits for any
        for prefetch in self._kept:
            prefetch.close(max(0.0, until - time.monotonic()))

    def _on_nearly_done(self) -> None:
        with self._lock:
            self._nearly_done += 1
            self._make_if_due()

    def _make_if_due(self) -> None:
        if self._made == self._nearly_done and self._made - self._asked_for < 2 and not self._closed:
            self._made += 1
            self._kept.append(Prefetch(self._make(self._on_nearly_done)))
