"""All runs of a storage in one table."""

from __future__ import annotations

from collections.abc import Sequence

from pyarrow import fs as pafs
from rich.table import Table
from rich.text import Text

from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.report.facts import Facts, read_facts
from vlmo_ray.report.health import duration
from vlmo_ray.runs.evaluations import line
from vlmo_ray.runs.load import described


def read_runs(storage: str) -> tuple[list[Facts], list[str]]:
    """The runs in `storage`, in the order of their names, of each only what its newest steps tell; and why others could
    not be read."""
    place = open_store(storage)
    entries = place.patiently("", lambda: place.fs.get_file_info(pafs.FileSelector(place.root, recursive=False)))
    names = sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)
    found, problems = [], []
    flag = place.uri.removeprefix(place.address(""))  # ?anonymous
    for name in names:
        uri = place.address(name) + flag
        try:
            if described(Store(uri)):
                found.append(read_facts(uri, brief=True))
        except UserError as error:
            problems.append(str(error))
    return found, problems


def table(runs: Sequence[Facts]) -> Table:
    """State, step, time left, loss and newest evaluation; at most 80 columns wide."""
    out = Table("run", "state", title=f"runs: {len(runs)}", title_justify="left")
    for head in ("step", "left", "loss"):
        out.add_column(head, justify="right", no_wrap=True)
    out.add_column("newest evaluation")
    for facts in runs:
        left = facts.seconds_left if facts.state == "running" else None
        loss = facts.curves.recent.get("loss")
        evaluated = " ".join(line(result, 1) for _, result in facts.newest())
        out.add_row(
            Text(facts.name),
            {"failed": "[red]failed[/]", "silent": "[red]silent[/]", "running": "[green]running[/]"}.get(
                facts.state, facts.state
            ),
            f"{facts.curves.last:,}/{facts.total_steps:,}",
            "" if left is None else duration(left),
            "" if loss is None else f"{loss:.3f}",
            evaluated,
        )
    return out


def as_dict(facts: Facts) -> dict:
    """For programs."""
    return {
        "run": facts.uri, "recipe": facts.config.name, "state": facts.state, "step": facts.curves.last,
        "total_steps": facts.total_steps, "seconds_left": facts.seconds_left if facts.state == "running" else None,
        "checkpoint": max(facts.checkpoints, default=None), "heard_at": facts.heard_at, "recent": facts.curves.recent,
        "evaluation": {name: score.value for _, result in facts.newest() for name, score in result.scores.items()},
    }  # fmt: skip
