"""Folders on local disk that outlive a killed process only until the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "vlmo-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this process under TMPDIR, which first removes those that killed processes of this user left there.

    Beside each stands a locked file: the lock ends with its process, in whatever container that ran.
    """
    base = Path(tempfile.gettempdir())
    for lock in base.glob(f"{_PREFIX}*.lock"):
        _remove_if_left(lock)
    folder = base / f"{_PREFIX}{uuid.uuid4().hex}"
    lock, unseen = folder.with_suffix(".lock"), folder.with_suffix(".new")
    with unseen.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unseen.rename(lock)  # only now may others look at it
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_if_left(lock: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        if lock.stat().st_uid != os.getuid():
            return
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
