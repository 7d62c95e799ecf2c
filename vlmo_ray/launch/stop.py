"""How a run is asked to end from outside: by a signal to its driver, or because its lease went to another driver."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.events import tell

STOP = "stop"  # an object in the run's store: its workers save and end


class Stopped(UserError):
    """The run saved and ended on request."""


class Stop:
    """What has been asked of the run so far."""

    def __init__(self, run: Store, event: threading.Event | None = None):
        self._run, self._lost = run, ""
        self._event, self._told = event or threading.Event(), False

    @property
    def asked(self) -> bool:
        """Whether the run is to save and end."""
        return self._event.is_set()

    def ask(self) -> None:
        self._event.set()

    def lose(self, reason: str) -> None:
        """The run is another driver's from now on. Called from another thread."""
        self._lost = reason

    def check(self) -> None:
        """Tells the workers what has been asked. Raises UserError if the run is another driver's by now."""
        if self._lost:
            raise UserError(self._lost)
        if self.asked and not self._told:
            self._told = True
            threading.Thread(target=self._run.write, args=(STOP, b""), daemon=True).start()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block a first SIGTERM or SIGINT (Ctrl-C) asks the run to end; a second one ends this process.
        Outside the main thread, where Python allows no handlers, signals do what they did before."""
        self._run.delete(STOP)
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _) -> None:
            restore()
            name = signal.Signals(number).name
            tell("stop", f"{name}: the workers save and end; a second one ends them at once", signal=name)
            self.ask()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            restore()
