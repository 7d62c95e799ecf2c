"""The commands in README.md and docs/ are commands of this version: every `vlmo` line parses and names what exists.

Not those of docs/log.md and docs/benchmarks/, which say what was run on some day.
"""

import functools
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmo_ray import cli
from vlmo_ray.data.prepare import FORMATS
from vlmo_ray.overrides import override
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.tasks import kinds

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *ROOT.glob("CONTRIBUTING.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/tasks/*.md"),
    *ROOT.glob("docs/failures/*.md"),
]
COMMANDS = [
    name for name, value in vars(cli).items()
    if inspect.isfunction(value) and value.__module__ == cli.__name__ and name != "main"
]  # fmt: skip


def lines() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every line in a code block, indented or fenced; a line that ends in a backslash goes on."""
    for page in PAGES:
        if page.name == "log.md":
            continue
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
        for line in [*indented, *"\n".join(fenced).splitlines()]:
            if re.match(r"(vlmo|make|ray job submit|python \S+\.py) ", line.removeprefix("$ ")):
                yield str(page.relative_to(ROOT)), shlex.split(line.removeprefix("$ "), comments=True)


VLMO = [(page, words[1:]) for page, words in lines() if words[0] == "vlmo"]


def recorded(patch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """The subcommands that `vlmo` would have run from now on, with all their arguments."""
    called = []

    def instead_of(function):
        @functools.wraps(function)
        def record(*args, **kwargs):
            given = inspect.signature(function).bind(*args, **kwargs)
            given.apply_defaults()
            called.append((function.__name__, given.arguments))

        return record

    for name in COMMANDS:
        patch.setattr(cli, name, instead_of(getattr(cli, name)))
    return called


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict]]:
    return recorded(monkeypatch)


def test_there_are_commands():
    assert {words[0] for _, words in VLMO} >= {"prepare", "train", "evaluate", "import", "export"}
    assert {page for page, _ in VLMO} >= {"README.md", "docs/data.md", "docs/weights.md"}


@pytest.mark.parametrize("page, arguments", VLMO, ids=[f"{page}: {' '.join(words)}" for page, words in VLMO])
def test_a_command_is_one_of_this_version(vlmo, calls, page, arguments):
    run = vlmo(*arguments)
    assert run.returncode == 0, run.stderr + run.stdout
    [(command, given)] = calls
    if "recipe" in given:
        override(recipe(given["recipe"]), list(given["settings"]))
    if command == "prepare":
        known = inspect.signature(FORMATS[given["format"]]).parameters
        assert {option.partition("=")[0] for option in given["option"]} <= set(known)
    if command == "evaluate":
        assert given["task"] in ("", *kinds())


@pytest.mark.parametrize(
    "arguments", [words for _, words in VLMO if words[0] in ("recipes", "show")] + [["recipes"], ["show", "tiny"]]
)
def test_a_command_that_needs_nothing_runs(vlmo, arguments):
    run = vlmo(*arguments)
    assert run.returncode == 0 and run.stdout, run.stderr


def test_a_training_that_takes_gpus_says_how_many():
    """In a comment above it. So does what takes long without; `test_docs_run.py` runs all other commands."""
    told = 0
    for page in PAGES:
        above = ""
        for line in page.read_text().split("\n"):
            found = re.match(
                r"    (?:vlmo (?:train|tune)|ray job submit .* python) (?:jobs/)?(\w+)(?:\.py (\w+))?", line
            )
            name = found[1].replace("stages", found[2] or "") if found else ""
            if name in RECIPES and page.name != "log.md":
                cluster = recipe(name).cluster
                gpus = cluster.max_workers * cluster.gpus_per_worker
                assert re.findall(r"^    # up to (\d+) GPUs$", above) == [str(gpus)] * bool(gpus), f"{page}: {line}"
                told += bool(gpus)
            elif re.match(r"    (ray job submit|python (benchmarks|jobs)/)", line) and page.name != "log.md":
                assert re.search(r"^    # .*\b(CPU|GPUs)\b", above), f"{page}: {line}"
            above = line
    assert told >= 15


def test_make_targets_and_scripts_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = {words[1] for _, words in lines() if words[0] == "make"}
    assert asked and asked <= set(targets)
    scripts = {word for _, words in lines() for word in words if re.fullmatch(r"(jobs|benchmarks|tests)/\S+\.py", word)}
    assert scripts and all((ROOT / script).exists() for script in scripts)
