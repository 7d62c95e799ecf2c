"""One program at a time works on a run: a small object in the run's store says who.

The holder renews it; a lease that was not renewed for a while belongs to nobody, and one whose holder was a process
of this machine that is gone is taken over at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

_NAME = "lease.json"
RENEW_S = 10.0
LAPSE_S = 45.0
_SETTLE_S = 0.5  # of two that write at once, the later one stands after this


@dataclass(frozen=True)
class Holder:
    """Who holds the lease."""

    token: str
    host: str
    boot: str  # of the host: process ids begin anew with it
    pid: int
    process_start: str
    renewed: float  # seconds since 1970

    @property
    def here(self) -> bool:
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.here and _start_of(self.pid) != self.process_start


class _Lease:
    """A lease held by this process."""

    def __init__(self, run: Store):
        self._run = run
        self._holder = Holder(
            uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), _start_of(os.getpid()), time.time()
        )

    def renew(self) -> None:
        self._holder = replace(self._holder, renewed=time.time())
        self._run.write(_NAME, json.dumps(asdict(self._holder)).encode())

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._run.read(_NAME)))
        except FileNotFoundError:
            return None

    def take(self) -> None:
        first = current = self._read()
        # the holder's clock may not be ours: a lease lapses when it is seen unchanged for long enough
        until = time.monotonic() + LAPSE_S
        while current is not None and not current.gone:
            if current.here or current != first:
                raise UserError(
                    f"the run {self._run.uri} is already being trained, by process {current.pid} on {current.host}; "
                    "wait for it, end it, or give another --name"
                )
            if time.monotonic() > until:
                break
            if current is first:
                print(
                    f"waiting up to {LAPSE_S:.0f} s to see whether {current.host} still trains this run",
                    flush=True,
                )
            time.sleep(2)
            current = self._read()
        self.renew()
        time.sleep(_SETTLE_S)
        winner = self._read()
        if winner is None or winner.token != self._holder.token:
            raise UserError(
                f"another program began to train {self._run.uri} at the same time; this one gives way"
            )

    def give_back(self) -> None:
        current = self._read()
        if current is not None and current.token == self._holder.token:
            self._run.delete(_NAME)


@contextmanager
def lease(run: Store) -> Iterator[None]:
    """Holds the lease of `run` inside the block. Raises UserError while another program holds it."""
    held, ended = _Lease(run), threading.Event()
    held.take()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            held.renew()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        held.give_back()


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _start_of(pid: int) -> str:
    """When a process of this machine began, "" if there is none; where that cannot be told, its id."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return str(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]
