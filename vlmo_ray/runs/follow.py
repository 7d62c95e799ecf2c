"""Reads what a run writes down while it does."""

from __future__ import annotations

import json
import re
from typing import Any

from vlmo_ray.data.store import Store


class Following:
    """The new lines of the objects of a folder, `metrics/` or `events/` of a run, in the order they were begun.

    Objects that were begun before `after` (ns since 1970) are left out; `begun` is that of the newest that was read.
    The times are of the processes that wrote them, whose clocks may differ.
    """

    def __init__(self, run: Store, folder: str, after: int = 0):
        self._run, self._folder, self._after = run, folder, after
        self._read: dict[str, tuple[int, int]] = {}  # bytes and lines of each object
        self.begun = after

    def skip(self, run: Store | None = None) -> None:
        """What is there by now is not new; `run` is the same store, with another patience."""
        self._read = {name: (size, 0) for name, size in (run or self._run).sizes(self._folder).items()}

    def new(self) -> list[dict[str, Any]]:
        """What was not there at the last call. If one object cannot be read, the others' lines come next time too."""
        found, read, begun = [], {}, self.begun
        for name, size in sorted(self._run.sizes(self._folder).items(), key=lambda item: _begun(item[0])):
            before = self._read.get(name, (0, 0))
            if _begun(name) < self._after or before[0] == size:
                continue
            lines = self._run.read(name).splitlines()
            found += map(json.loads, lines[before[1] :])
            read[name], begun = (size, len(lines)), max(begun, _begun(name))
        self._read |= read
        self.begun = begun
        return found


def _begun(name: str) -> int:
    number = re.match(r"\d+", name.rpartition("/")[2])
    return int(number[0]) if number else 0
