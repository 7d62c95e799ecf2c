"""A thread that keeps some items of an iterator ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

from vlmo_ray.errors import UserError


def user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` that a task raised, out of what Ray wraps it in; None if it raised something else."""
    found = None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # Ray's wrapper poses as the type of what it wraps, with a traceback for a message: take the innermost
        found = error if isinstance(error, UserError) else found
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__
    # Ray Data adds advice about its own settings to the message of what it passes on
    return found and type(found)(str(found).partition("\nFailed to apply UDF")[0])


class Prefetch(Iterator):
    """The items of an iterator, made by a thread up to `depth` ahead; its errors are raised here.

    `close` (or garbage collection) ends the thread after the item it is making; a generator is closed in it.
    """

    def __init__(self, source: Iterator, depth: int):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        # no reference to self, so that dropping the iterator ends the thread; a daemon, so that a thread
        # that waits for Ray does not keep the interpreter from ending
        self._thread = threading.Thread(
            target=_fill, args=(source, self._queue, self._stop), name="data", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Any:
        while not self._stop.is_set():
            try:
                kind, value = self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
            if kind == "item":
                return value
            self._stop.set()
            if kind == "error":
                raise value
        raise StopIteration

    def close(self, wait_s: float = 10.0) -> None:
        self._stop.set()
        self._thread.join(wait_s)

    def __del__(self):
        self._stop.set()


def _fill(source: Iterator, results: queue.Queue, stop: threading.Event) -> None:
    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return results.put((kind, value), timeout=0.2)
            except queue.Full:
                continue

    try:
        for item in source:
            put("item", item)
            if stop.is_set():
                break
        put("end", None)
    except BaseException as error:  # whatever it is belongs to the consumer
        put("error", error)
    finally:
        if isinstance(source, Generator):
            source.close()
