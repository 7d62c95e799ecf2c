"""A thread that keeps some batches ready, and finds out when Ray has no CPU to make the first one."""

from __future__ import annotations

import queue
import threading
import time
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


class CpuProbe:
    """A task that asks for what a data task asks for: if it never runs, data tasks do not either.

    Ray Train reserves its CPUs first. With none left over, Ray Data waits for ever and says nothing.
    """

    def __init__(self, num_cpus: float, wait_s: float):
        import ray

        self._num_cpus = num_cpus
        self._task = ray.remote(num_cpus=num_cpus, max_retries=0)(_nothing).remote()
        self._wait_s = wait_s
        self._deadline = time.monotonic() + wait_s

    def check(self) -> None:
        """Raises `UserError` once it is clear that no CPU is to be had."""
        import ray

        if self._task is None or time.monotonic() < self._deadline:
            return
        if ray.wait([self._task], timeout=0)[0]:
            self._task = None
            return
        free = ray.available_resources().get("CPU", 0.0)
        if free < self._num_cpus:
            total = ray.cluster_resources().get("CPU", 0.0)
            ray.cancel(self._task)
            raise UserError(
                f"No data task could start within {self._wait_s:.0f} s: it asks for {self._num_cpus:g} CPU, "
                f"and of the cluster's {total:g} CPUs {free:g} are free. Lower cluster.cpus_per_worker, "
                "cluster.max_workers or cluster.data_cpus_per_worker, or add a node."
            )


def _nothing() -> None:
    pass


class Prefetch(Iterator):
    """The items of an iterator, made by a thread up to `depth` ahead; its errors are raised here.

    `close` (or garbage collection) ends the thread after the item it is making; a generator is closed in it.
    """

    def __init__(self, source: Iterator, depth: int, probe: CpuProbe | None = None):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._probe = probe
        self._starved = False
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
                kind, value = "nothing", None
            if kind == "nothing":
                self._check_cpu()
                continue
            self._probe = None  # something came: there is a CPU
            if kind == "item":
                return value
            self._stop.set()
            if kind == "error":
                raise value
        raise StopIteration

    def _check_cpu(self) -> None:
        try:
            if self._probe is not None:
                self._probe.check()
        except UserError:
            self._starved = True
            self._stop.set()
            raise

    def close(self, wait_s: float = 10.0) -> None:
        self._stop.set()
        if not self._starved:  # or else the thread waits for the CPU that it will not get
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
