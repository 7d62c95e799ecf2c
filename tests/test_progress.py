"""A bar on a terminal, nothing elsewhere; the items in any case."""

import io

import pytest
from rich.console import Console

from vlmo_ray import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_items_come_through_and_a_terminal_sees_how_many(monkeypatch, terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=80)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    items = ["a", "bb", "ccc"]
    assert list(progress.tracked(items, "counting", 7, len, done=1)) == items
    assert ("counting" in shown.getvalue()) == terminal and ("7/7" in shown.getvalue()) == terminal
