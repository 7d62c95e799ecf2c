"""The lease of a run: a small object in its store that names the one program that may train it.

The holder renews the lease. Another program takes it over if it was not renewed for `LAPSE_S`, or at once if the holder
was a process of the same machine that has ended. A holder that finds another's lease has lost the run and is told so.

Every write names the version it replaces, and a server with conditional writes (S3's If-Match) refuses it if another
program wrote in between: of two that begin at once, one gets the lease. In a folder, and on a server that ignores the
condition, the write that arrives last wins; each program therefore looks again after `_SETTLE_S`.

A holder that was cut off from the storage for longer than `LAPSE_S` may have been replaced, and goes on until its next
look: every `RENEW_S`, but not while the storage is unreachable.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.events import tell

_NAME = "lease.json"
RENEW_S = 10.0
LAPSE_S = 45.0
_SETTLE_S = 0.5  # how long a program waits before it checks whether its write was the last one


@dataclass(frozen=True)
class Holder:
    """The program that holds the lease."""

    token: str
    host: str
    boot: str  # id of the host's boot: process ids start over with it
    pid: int
    process_start: str
    renewed: float  # seconds since 1970
    pid_namespace: str = ""  # containers may share a host's name but not its process ids

    @property
    def here(self) -> bool:
        """Whether this process can look up the holder's process id."""
        here = socket.gethostname(), _boot(), _pid_namespace()
        return (self.host, self.boot, self.pid_namespace) == here

    @property
    def gone(self) -> bool:
        """Whether the holder is known to have ended."""
        return self.here and _start_of(self.pid) != self.process_start


class _Lease:
    """A lease held by this process."""

    def __init__(self, run: Store):
        self._run = run
        self._impatient = replace(run, retry_timeout_s=0.0)
        self._holder = Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            process_start=_start_of(os.getpid()),
            renewed=time.time(),
            pid_namespace=_pid_namespace(),
        )

    @property
    def token(self) -> str:
        return self._holder.token

    def _write(self, run: Store, version: str | None) -> Holder | None:
        """Writes the lease in place of `version`; returns who holds it then."""
        self._holder = replace(self._holder, renewed=time.time())
        if run.replace(_NAME, json.dumps(asdict(self._holder)).encode(), version):
            return self._holder
        return _read(run)[0]  # which may be this one all the same, see `Store.replace`

    def _is_mine(self, current: Holder | None) -> bool:
        return current is not None and current.token == self._holder.token

    def take(self) -> None:
        first, version = _read(self._run)
        current = first
        # clocks may differ, so a lease lapses only after it was seen unchanged for long enough
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
                tell("lease", f"waiting up to {LAPSE_S:.0f} s to see whether {current.host} still trains this run")
            time.sleep(2)
            current, version = _read(self._run)
        current = self._write(self._run, version)
        if self._is_mine(current):
            time.sleep(_SETTLE_S)
            current, _ = _read(self._run)
        if not self._is_mine(current):
            raise UserError(f"another program began to train {self._run.uri} at the same time; this one gives way")

    def renew(self) -> Holder | None:
        """Renews the lease; returns another holder if there is one by now, else None.

        Does not retry: while a write waits for the storage, another program may take the lease that was just read.
        """
        current, version = _read(self._impatient)
        if current is None or self._is_mine(current):
            current = self._write(self._impatient, version)
        return None if current is None or self._is_mine(current) else current

    def keep(self, ended: threading.Event, on_lost: Callable[[str], None]) -> None:
        """Renews until `ended` or until another program holds the lease; retries while the storage is unreachable."""
        wait, failing = 4 * _SETTLE_S, False
        while not ended.wait(wait):
            wait = RENEW_S
            try:
                other = self.renew()
            except (UserError, OSError) as error:
                if not failing:
                    tell("lease", f"the lease of {self._run.uri} could not be renewed; retrying: {error}")
                failing = True
                continue
            failing = False
            if other is not None:
                on_lost(_taken_over(self._run, other))
                return

    def give_back(self) -> None:
        current, version = _read(self._run)
        if self._is_mine(current):
            self._run.delete(_NAME, version)


@contextmanager
def lease(run: Store, on_lost: Callable[[str], None]) -> Iterator[str]:
    """Holds the lease of `run` inside the block; yields its token. Raises UserError if another program holds the lease.

    If another program takes it over, calls `on_lost` once, from another thread, with a sentence that names the program.
    """
    held, ended = _Lease(run), threading.Event()
    held.take()
    thread = threading.Thread(target=held.keep, args=(ended, on_lost), name="lease", daemon=True)
    thread.start()
    try:
        yield held.token
    finally:
        ended.set()
        thread.join()
        held.give_back()


def check(run: Store, token: str) -> None:
    """Raises UserError if another token holds the lease of `run`."""
    current, _ = _read(run)
    if current is not None and current.token != token:
        raise UserError(_taken_over(run, current))


def held(run: Store) -> bool:
    """Whether a program holds the lease of `run`, or has ended without giving it back."""
    return run.exists(_NAME)


def renewed_at(run: Store) -> float:
    """When the holder of the lease of `run` last renewed it, in seconds since 1970 by its clock; 0: nobody has it."""
    holder, _ = _read(run)
    return holder.renewed if holder else 0.0


def _read(run: Store) -> tuple[Holder | None, str | None]:
    """Who holds the lease, and the version of that."""
    try:
        content, version = run.read_version(_NAME)
    except FileNotFoundError:
        return None, None
    return Holder(**json.loads(content)), version


def _taken_over(run: Store, other: Holder) -> str:
    return (
        f"{run.uri} was taken over by process {other.pid} on {other.host} while this one could not renew its lease, "
        "or both began at once"
    )


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process of this machine started; "" if it does not run. Without /proc, its id stands for the time."""
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
