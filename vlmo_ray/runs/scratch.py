"""Temporary folders; those of killed processes are removed when the next process starts."""

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
    """Yields a folder of this process under TMPDIR, after removing those that killed processes of this user left there.

    Each folder has a locked file beside it. The lock ends with its process, in whatever container that ran.
    """
    base = Path(tempfile.gettempdir())
    for lock in base.glob(f"{_PREFIX}*.lock"):
        _remove_if_left(lock)
    folder = base / f"{_PREFIX}{uuid.uuid4().hex}"
    lock, unseen = folder.with_suffix(".lock"), folder.with_suffix(".new")
    with unseen.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unseen.rename(lock)  # others see it only when it is locked
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_if_left(lock: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process removed it first
        if lock.stat().st_uid != os.getuid():
            return
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
