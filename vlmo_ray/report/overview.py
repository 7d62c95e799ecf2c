"""All runs of a storage in one table."""

from __future__ import annotations

from collections.abc import Sequence

from pyarrow import fs as pafs
from rich.table import Table

from vlmo_ray.data.store import Store, open_store
from vlmo_ray.report.facts import Facts, read_facts
from vlmo_ray.report.health import duration
from vlmo_ray.runs.evaluations import line
from vlmo_ray.runs.load import described


def read_runs(storage: str) -> list[Facts]:
    """The runs in `storage`, in the order of their names; of each only what its newest steps tell."""
    place = open_store(storage)
    entries = place.patiently("", lambda: place.fs.get_file_info(pafs.FileSelector(place.root, recursive=False)))
    names = sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)
    return [read_facts(place.address(name), brief=True) for name in names if described(Store(place.address(name)))]


def table(runs: Sequence[Facts]) -> Table:
    """State, step, time left, loss and newest evaluation; at most 80 columns wide."""
    out = Table("run", "state", title=f"{len(runs)} runs", title_justify="left")
    for head in ("step", "left", "loss"):
        out.add_column(head, justify="right", no_wrap=True)
    out.add_column("newest evaluation")
    for facts in runs:
        left = facts.seconds_left if facts.state == "running" else None
        loss = facts.curves.recent.get("loss")
        evaluated = line(facts.evaluations[-1][1], 1) if facts.evaluations else ""
        out.add_row(
            facts.name,
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
        "evaluation": {name: score.value for name, score in facts.evaluations[-1][1].scores.items()}
        if facts.evaluations else {},
    }  # fmt: skip
