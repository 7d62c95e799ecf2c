"""What is told of a run: on the console, in the run, and what follows it there."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import pytest
from terminal import attach

from vlmo_ray.data.store import Store
from vlmo_ray.runs.events import console, keeping, show, tell
from vlmo_ray.runs.follow import Following


def until(found: Callable[[], bool]) -> None:
    """Not by pytest's capture: what a thread prints while that is read can be lost."""
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def _kept(run: Store) -> list[dict]:
    return [json.loads(line) for name in sorted(run.list("events/")) for line in run.read(name).splitlines()]


def test_a_sentence_or_an_object_or_nothing(capsys):
    tell("start", "it begins", workers=2)
    assert capsys.readouterr().out == "it begins\n"
    with console("json"):
        tell("start", "it begins", workers=2)
        with console("none"):
            tell("start", "unseen")
        tell("end", "it ends")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first.pop("time")[:2], first) == ("20", {"event": "start", "message": "it begins", "workers": 2})
    assert second["event"] == "end"
    show("end", "it ends")
    assert capsys.readouterr().out == "it ends\n"


def test_long_sentences_are_broken_on_a_terminal_alone(monkeypatch, capsys):
    long = " ".join(["word  word"] * 10) + " s3://" + "x" * 60 + "\nand so on"
    show("long", long)
    assert capsys.readouterr().out == f"{long}\n"
    shown = attach(monkeypatch)
    show("long", long)
    first, *others, last = shown.screen()
    assert len(first) <= 80 and all(line.startswith("  ") for line in others) and last == "and so on"
    assert " ".join([first, *others, last]).split() == long.split()
    monkeypatch.setattr("sys.stdout", None)
    show("long", long)


def test_what_is_told_is_kept_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo_ray.runs.events._LINES", 3)
    run = Store(str(tmp_path))
    with keeping(run, "driver"), console("none"):
        for step in range(8):
            tell("checkpoint", f"step {step}", step=step)
            if step == 4:
                following = Following(run, "events/")
                while not run.list("events/"):
                    pass
                early = following.new()
        show("step", "not kept")
    kept = _kept(run)
    assert [entry["step"] for entry in kept] == list(range(8))
    assert {entry["who"] for entry in kept} == {"driver"} and {entry["event"] for entry in kept} == {"checkpoint"}
    assert len(run.list("events/")) > 1
    assert early + following.new() == kept and following.new() == []


def test_storage_that_is_away_stops_nothing_and_gets_it_later(tmp_path, monkeypatch):
    run, write, away = Store(str(tmp_path)), Store.write, [True]

    def flaky(store, name, data):
        if away and name.startswith("events/"):
            raise OSError("away")
        write(store, name, data)

    monkeypatch.setattr(Store, "write", flaky)
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    with keeping(run, "worker"):
        tell("a", "first")
        until(lambda: "not stored for now" in out.getvalue())
        away.clear()
        tell("b", "second")
    assert "away" in out.getvalue() and [entry["event"] for entry in _kept(run)] == ["a", "b"]


def test_what_others_would_show_is_told_here_while_storage_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "write", lambda *given: (_ for _ in ()).throw(OSError("away")))
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    with console("none"), keeping(Store(str(tmp_path)), "worker"):
        tell("a", "the first sentence")
        until(lambda: "the first sentence" in out.getvalue())
    assert out.getvalue().startswith("what happens is not stored for now, but told here: away\n")


def test_following_reads_only_what_grew(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    run.write("metrics/10.jsonl", b'{"step": 1}\n')
    following, read, reads = Following(run, "metrics/"), Store.read, []
    monkeypatch.setattr(Store, "read", lambda store, name: reads.append(name) or read(store, name))
    assert following.new() == [{"step": 1}]
    run.write("metrics/9.jsonl", b'{"step": 0}\n')
    run.write("metrics/11.jsonl", b'{"step": 3}\n')
    run.write("metrics/10.jsonl", b'{"step": 1}\n{"step": 2}\n')
    assert following.new() == [{"step": 0}, {"step": 2}, {"step": 3}] and following.begun == 11
    assert reads == [f"metrics/{k}.jsonl" for k in (10, 9, 10, 11)]
    assert Following(run, "metrics/", after=11).new() == [{"step": 3}]
    with pytest.raises(ValueError):
        run.write("metrics/11.jsonl", b'{"step": 3}\n{"step": 4}\n')
        run.write("metrics/12.jsonl", b"{")
        following.new()
    run.write("metrics/12.jsonl", b'{"step": 5}\n')
    assert following.new() == [{"step": 4}, {"step": 5}]  # nothing was lost with what could not be read
