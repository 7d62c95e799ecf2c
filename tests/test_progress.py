"""What is drawn on a terminal and told in lines elsewhere; how a terminal is left; the items in any case."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from rich.text import Text
from terminal import Terminal, attach, screen

from vlmo_ray import progress
from vlmo_ray.progress import clock, drawn, tracked

ROOT = Path(__file__).parents[1]


def _counted(monkeypatch, shown: io.StringIO) -> str:
    monkeypatch.setattr("sys.stderr", shown)
    items = ["a", "bb", "ccc"]
    found = []
    for item in tracked(items, "counting", 7, len, done=1):
        print(f"at {item}")
        found.append(item)
    assert found == items
    return shown.getvalue()


def test_a_bar_on_a_terminal_and_nothing_is_left_of_it(monkeypatch):
    terminal = attach(monkeypatch)
    errors = Terminal()
    written = _counted(monkeypatch, errors)
    assert "counting" in written and "7/7" in written and "\x1b[?25" not in written
    assert errors.screen() == ["at a", "at bb", "at ccc"] and terminal.getvalue() == ""


def test_what_goes_to_a_file_stays_there_beside_a_bar(monkeypatch):
    attach(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    errors = Terminal()
    _counted(monkeypatch, errors)
    assert file.getvalue() == "at a\nat bb\nat ccc\n" and errors.screen() == [""]


@pytest.mark.parametrize("setting", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}], ids=str)
def test_elsewhere_a_line_now_and_then(monkeypatch, setting):
    """A pipe stays one with FORCE_COLOR."""
    attach(monkeypatch)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    is_terminal = "TERM" in setting or "NO_COLOR" in setting
    kind = Terminal if is_terminal else io.StringIO
    assert _counted(monkeypatch, kind()) == ""
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    now = iter([0.0, 10.0, 30.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    told = _counted(monkeypatch, kind()).splitlines()
    assert told == ["counting: 2/7, 0:50 left", "counting: 4/7, 0:30 left", "counting: 7/7, 0:00 left"]


def test_times():
    assert [clock(s) for s in (0.4, 61, 3725.2, float("nan"), float("inf"))] == ["0:00", "1:01", "1:02:05", "?", "?"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "_DRAW_S", 0.01)


def test_lines_come_above_what_is_drawn(monkeypatch, quick):
    terminal = attach(monkeypatch)
    number = iter(range(10**9))
    with drawn(lambda: Text(f"block {next(number)}\nits second line")) as is_drawn:
        assert is_drawn
        for line in ("first", "[bold]second[/nothing] :smile: " + 60 * "x", "(pid=7) \x1b[36mthird\x1b[0m"):
            print(line, flush=True)
            print(line, file=sys.stdout, end="")
            print(flush=True)
            drawn_again = terminal.getvalue().count("block") + 2
            while terminal.getvalue().count("block") < drawn_again:
                time.sleep(0.01)
    assert sys.stdout is terminal
    last = next(number) - 1
    wrapped = ["[bold]second[/nothing] :smile:", 60 * "x"]  # at 80 columns
    lines = ["first"] * 2 + wrapped * 2 + ["(pid=7) third"] * 2
    assert terminal.screen() == [*lines, f"block {last}", "its second line"]
    assert terminal.getvalue().endswith("\n")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_ends_the_drawing(monkeypatch, quick, error):
    terminal = attach(monkeypatch)
    before, threads = (sys.stdout, sys.stderr), threading.active_count()
    with pytest.raises(error), drawn(lambda: Text("block")):
        time.sleep(0.03)
        print("now")
        raise error
    assert (sys.stdout, sys.stderr) == before and threading.active_count() == threads
    assert terminal.screen() == ["now", "block"] and "\x1b[?" not in terminal.getvalue()


def test_what_cannot_be_drawn_stops_nothing_and_is_told_once(monkeypatch, quick):
    terminal = attach(monkeypatch)
    looks = []

    def look() -> Text:
        looks.append(1)
        if len(looks) > 1:
            raise OSError("away")
        return Text("block")

    with drawn(look):
        while len(looks) < 5:
            time.sleep(0.01)
        print("a line")
    assert terminal.screen() == ["what is drawn here is not up to date: OSError: away", "a line", "block"]


@pytest.mark.parametrize("setting", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {}], ids=str)
def test_nothing_is_drawn_without_a_terminal(monkeypatch, setting):
    shown = attach(monkeypatch) if setting else io.StringIO()
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", shown)
    with drawn(lambda: pytest.fail("looked")) as is_drawn:
        print("a line", flush=True)
    assert not is_drawn and shown.getvalue() == "a line\n"


def test_nor_outside_the_main_thread(monkeypatch):
    terminal = attach(monkeypatch)
    found = []

    def draw() -> None:
        with drawn(lambda: Text("block")) as is_drawn:
            found.append(is_drawn)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert found == [False] and terminal.getvalue() == ""


@pytest.mark.timeout(60)
def test_a_signal_handler_may_print_at_any_moment(monkeypatch):
    """With two locks this blocks for ever."""
    terminal = attach(monkeypatch)
    monkeypatch.setattr(progress, "_DRAW_S", 0.0)
    heard = []

    def hear(*_) -> None:
        heard.append(1)
        print("heard", flush=True)

    before = signal.signal(signal.SIGVTALRM, hear)
    try:
        with drawn(lambda: Text("block")):
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                print("a line", flush=True)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert heard and terminal.getvalue().count("heard") == len(heard)


_SCRIPT = """
import signal, sys, time
from rich.text import Text
from vlmo_ray.progress import drawn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    with drawn(lambda: Text("block")):
        print("an error", file=sys.stderr, flush=True)
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_real_terminal_is_left_as_it_was(number):
    """After Ctrl-C, and after a kill that nothing can answer to."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    modes = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave,
        env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"},
    )  # fmt: skip
    written = ""
    while "block" not in written.partition("ready")[2]:
        written += os.read(master, 4096).decode()
    time.sleep(0.2)  # until it is asleep
    process.send_signal(number)
    assert process.wait(30) != 0
    assert termios.tcgetattr(slave) == modes
    os.close(slave)
    try:
        while piece := os.read(master, 4096):
            written += piece.decode()
    except OSError:  # what Linux says when the last writer is gone
        pass
    os.close(master)
    assert "\x1b[?" not in written
    interrupted = ["interrupted"] if number == signal.SIGINT else []
    assert screen(written.replace("\r\n", "\n")) == ["an error", "ready", "block", *interrupted]
