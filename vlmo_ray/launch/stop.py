"""How a run is asked to end from outside: by a signal to its driver, or because its lease went to another driver."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

STOP = "stop"  # an object in the run's store: its workers save and end


class Stop:
    """What has been asked of the run so far."""

    def __init__(self, run: Store):
        self.asked = False  # to save and end
        self._run, self._lost = run, ""

    def lose(self, reason: str) -> None:
        """The run is another driver's from now on. Called from another thread."""
        self._lost = reason

    def check(self) -> None:
        """Raises UserError if the run is another driver's; nothing is asked of it any more."""
        if self._lost:
            raise UserError(self._lost)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block a first SIGTERM or SIGINT (Ctrl-C) sets `asked` and tells the workers; a second one ends
        this process. Outside the main thread, where Python allows no handlers, signals do what they did before."""
        self._run.delete(STOP)
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _) -> None:
            restore()
            name = signal.Signals(number).name
            print(f"{name}: the workers save and end; a second one ends them at once", flush=True)
            self.asked = True
            if not self._lost:
                threading.Thread(target=self._run.write, args=(STOP, b""), daemon=True).start()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            restore()
