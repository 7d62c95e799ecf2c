"""What a terminal of 80 columns shows in the end of what was written to it."""

from __future__ import annotations

import io
import re
import unicodedata

import pytest

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal(io.StringIO):
    """Takes the place of stdout or stderr."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        return screen(self.getvalue())


def screen(written: str) -> list[str]:
    """All lines that were ever on the screen and not written over, the trailing empty ones left out.

    Knows colours, erasing a line, and going up; whatever else is written fails, as does a line of over 80 columns.
    """
    lines, row, column = [""], 0, 0
    for found in _PIECES.finditer(written):
        number, command, end, text = found.groups()
        if command == "A":
            row -= int(number or 1)
            assert row >= 0
        elif command == "K":
            assert number == "2"
            lines[row] = ""
        elif command is not None:
            assert command == "m", f"{found[0]!r} is left behind"
        elif end == "\r":
            column = 0
        elif end == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
            assert column + sum(unicodedata.east_asian_width(c) in "WF" for c in text) <= 80, lines[row]
    assert "".join(found[0] for found in _PIECES.finditer(written)) == written
    return [line.rstrip() for line in "\n".join(lines).rstrip().split("\n")]


def attach(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes stdout a terminal of 80 columns. Not in a fixture: pytest's own capture comes between that and the test."""
    for name in ("NO_COLOR", "FORCE_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    return shown
