"""Annotation files: a JSON list, JSON lines, or a list inside a JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from vlmo_ray.errors import UserError

# "leftmost", "right-hand", and how annotators of RefCOCO shorten them
_SIDE = re.compile(r"\b(left|right|lft|rght|rt)(most|hand|side|ie|y)?\b", re.IGNORECASE)


Kinds = Mapping[str, type | tuple[type, ...]]


def json_entries(data: bytes, address: str, required: Collection[str] | Kinds, key: str = "") -> list[dict]:
    """The entries of the file at `address`. Each has the `required` names; a mapping also gives the types of their
    values. `key` names the list inside a JSON object.

    Raises UserError that names the file, and the line or the entry, if it is of another form or has no entry.
    """
    entries: list = []
    number = 0  # of the entry that is being read, blank lines not counted
    try:
        if key or data.lstrip()[:1] == b"[":
            entries = json.loads(data)[key] if key else json.loads(data)
        else:
            for line in filter(None, map(bytes.strip, data.splitlines())):
                number += 1
                entries.append(json.loads(line))
        number = 0
        for entry in entries:
            number += 1
            if missing := [name for name in required if name not in entry]:
                raise KeyError(f"no {missing[0]!r}")
            for name, kind in required.items() if isinstance(required, Mapping) else ():
                if not isinstance(entry[name], kind):
                    raise TypeError(f"{name} is {entry[name]!r:.60}")
    except (ValueError, KeyError, TypeError) as error:
        where = f", at entry {number}" if number else ""
        raise UserError(f"{address} is not an annotation file of this format{where}: {error}") from error
    if not entries:
        raise UserError(f"{address} has no entry")
    return entries


def names_sides(text: str) -> bool:
    """Whether a horizontal flip could make the text untrue."""
    return _SIDE.search(text) is not None
