"""Facts about runs, laid out as one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

from bokeh.embed import components
from bokeh.model import Model
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined

from vlmo_ray.data.store import Store, store_and_name
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import flat, to_dict
from vlmo_ray.report import plots
from vlmo_ray.report.facts import POINTS, Facts, read_facts
from vlmo_ray.report.gallery import Gallery
from vlmo_ray.report.health import duration, findings
from vlmo_ray.runs.audit import audit as audited
from vlmo_ray.runs.evaluations import cell

NAME = "report.html"  # in the folder of a run
_EVENTS = 400  # in the table, the newest
_AUDITED_ROWS = 2_000_000  # that are audited without being asked to


def report(
    runs: Sequence[str], out: str = "", data: str = "", rows: int = 200, pictures: bool = True, audit: bool = False
) -> str:
    """Writes a page about the runs, of which the first is looked at in detail; returns where it is.

    Args:
        runs: folders or `s3://bucket/prefix`.
        out: the file to write, also on `s3://`; default: `report.html` in the first run.
        data: pairs for the pictures; default: the data that the run is evaluated on.
        rows: how many of them, from the first on.
        pictures: whether to run the model for pictures.
        audit: check what the run consumed, however much that is.

    Raises UserError if there is no such run, or `data` cannot be read.
    """
    if not runs:
        raise UserError("name a run: vlmo report RUN")
    if rows < 1:
        raise UserError(f"--rows {rows} must be at least 1")
    found = [read_facts(run, POINTS if len(runs) < 4 else POINTS // 3) for run in runs]
    shown, why = None, ""
    for facts, name in zip(found, _names([facts.uri for facts in found]), strict=True):
        facts.name = name
    first = found[0]
    where = data or first.address_of("eval_data")
    if not pictures:
        why = "they were left out (--no-pictures)"
    elif "itc" not in first.config.model.heads:
        why = "the model has no contrastive head"
    elif not first.checkpoints:
        why = "the run has no checkpoint yet"
    elif not where:
        why = "they need data: vlmo report RUN --data PAIRS"
    else:
        try:
            shown = Gallery.of(runs[0], where, rows)
        except UserError as error:
            if data:
                raise
            why = f"{error}; name other data by --data"
    html = render(found, shown, why, verdict(first, audit))
    store, name = store_and_name(out) if out else (Store(first.uri), NAME)
    store.write(name, html.encode())
    return store.address(name)


def _names(uris: Sequence[str]) -> list[str]:
    """The end of each address, as much of it as tells the runs apart."""
    parts = [uri.rstrip("/").split("/") for uri in uris]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{next(uri for uri in uris if uris.count(uri) > 1)} is named twice")


def verdict(facts: Facts, asked: bool = False) -> str:
    """What the audit says, or why it says nothing; of a long run only if that is `asked` for."""
    data = facts.address_of("data")
    if not facts.config.audit:
        return "The run keeps no record of what it consumes (audit=false)."
    if not asked and facts.curves.samples_at(facts.curves.last) > _AUDITED_ROWS:
        return "Not audited here, as that takes time: vlmo report RUN --audit, or vlmo audit RUN --data DATA."
    if not data:
        return "The run has not said where its data are: vlmo audit RUN --data DATA."
    try:
        return f"Audit, {audited(facts.uri, data).sentences()[-1]}."
    except UserError as error:
        return f"It could not be audited: {error}"


def render(runs: Sequence[Facts], gallery: Gallery | None, no_gallery: str = "", audited: str = "") -> str:
    """The page."""
    first = runs[0]
    figures = plots.curves(runs)
    evaluations, timeline = plots.evaluations(runs), plots.timeline(first)
    named = {f"{heading}-{i}": shown for heading, some in figures.items() for i, shown in enumerate(some)}
    named |= {f"evaluation-{i}": shown for i, shown in enumerate(evaluations)}
    named |= {"timeline": timeline} if timeline else {}
    script, divs = components(dict[str, Model](named)) if named else ("", {})
    environment = Environment(
        loader=PackageLoader("vlmo_ray.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"duration": duration, "time": _time, "commas": "{:,}".format}
    return environment.get_template("page.html").render(
        runs=runs,
        first=first,
        findings=findings(first),
        audited=audited,
        colours=[plots.colour(i) for i in range(len(runs))],
        curves={heading: [divs[f"{heading}-{i}"] for i in range(len(some))] for heading, some in figures.items()},
        evaluations=[divs[f"evaluation-{i}"] for i in range(len(evaluations))],
        zero=plots.always_zero(runs),
        scores=_scores(first),
        timeline=divs.get("timeline", ""),
        events=first.events[-_EVENTS:],
        more_events=max(0, len(first.events) - _EVENTS),
        gallery=gallery,
        no_gallery=no_gallery,
        config=json.dumps(to_dict(first.config), indent=1),
        changed=first.changed,
        differing=_differing(runs),
        bokeh=Resources(mode="inline", components=["bokeh"], minified=True).render_js(),
        script=script,
    )


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _scores(facts: Facts) -> list[tuple[str, str, str, str, str]]:
    """(metric, reached, chance, count, data) of the newest evaluation of each data set, task and metric."""
    newest = {}
    for step, result in facts.evaluations:
        for name, score in result.scores.items():
            newest[result.place, name] = (step, score)

    return [
        (
            f"{name}, step {step:,}",
            cell(score.value, score),
            "" if score.chance is None else cell(score.chance, score),
            f"{score.count:,}",
            data,
        )
        for (data, name), (step, score) in newest.items()
    ]


def _differing(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """(field, value of each run) of the settings in which the runs differ."""
    settings = [dict(flat(to_dict(facts.config))) for facts in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    rows = [(name, [json.dumps(values.get(name)) for values in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
