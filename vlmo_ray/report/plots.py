"""The figures of a report, by Bokeh: curves over the rows seen, evaluations, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh.models import BoxAnnotation, ColumnDataSource, CrosshairTool, DataRange1d, HoverTool, Range1d, Span, Title
from bokeh.palettes import Category10_10
from bokeh.plotting import figure

from vlmo_ray.report.facts import Facts
from vlmo_ray.runs.evaluations import Result

# What is shown together, in this order; a metric that is not named comes under the last heading.
GROUPS: dict[str, tuple[str, ...]] = {
    "Losses": ("loss", "itc", "itc_vl", "itm", "mlm", "mim", "cross_entropy", "answer_bce"),
    "What is right": ("itm_accuracy", "mlm_accuracy", "mim_accuracy", "accuracy", "predicted_true"),
    "Contrast and negatives": (
        "temperature", "temperature_vl", "negative_similarity", "same_share", "pairs_without_negative",
    ),
    "Speed": ("samples_per_s", "mfu", "data_wait", "step_s", "exchanged_bytes"),
    "Optimizer and rows": ("lr", "grad_norm", "skipped", "masked_rows"),
    "Others": (),
}  # fmt: skip
EXPLAINED = {
    "loss": "the weighted sum",
    "itc": "image-text contrast",
    "itc_vl": "contrast of the vision-language branch",
    "itm": "image-text matching",
    "mlm": "masked words",
    "mim": "masked patches",
    "answer_bce": "binary cross-entropy of the answers",
    "itm_accuracy": "of matching, on the mined negatives",
    "mlm_accuracy": "of masked words",
    "temperature": "of the contrast",
    "negative_similarity": "mean cosine of the negatives that are drawn",
    "same_share": "of all pairs of rows: the same image or text, no negatives",
    "pairs_without_negative": "rows that no other row may oppose",
    "mfu": "share of the GPU's peak",
    "data_wait": "share of a step spent waiting for rows",
    "step_s": "seconds of a step",
    "exchanged_bytes": "images of negatives that travel",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "skipped": "steps without an update",
}
TIMELINE = (
    "failed", "retry", "notice", "resize", "workers", "resumed", "repeated", "checkpoint", "evaluation", "masked",
    "skipped", "warning", "finished", "stopped",
)  # fmt: skip
_RED = {"failed", "retry", "skipped", "stopped"}


def colour(index: int) -> str:
    return Category10_10[index % 10]


def always_zero(runs: Sequence[Facts]) -> list[str]:
    """The metrics that are 0 in every step of every run, which need no figure."""
    found: dict[str, list[np.ndarray]] = {}
    for facts in runs:
        for name, mean in facts.curves.mean.items():
            found.setdefault(name, []).append(mean[np.isfinite(mean)])
    return sorted(name for name, means in found.items() if any(map(len, means)) and not any(m.any() for m in means))


def curves(runs: Sequence[Facts]) -> dict[str, list[figure]]:
    """By heading, a figure for each metric; the runs are laid over one another."""
    flat = set(always_zero(runs))
    named = {name for facts in runs for name in facts.curves.mean}
    grouped = {name for names in GROUPS.values() for name in names}
    sources = [_source(facts) for facts in runs]
    end = max((facts.curves.samples_at(facts.curves.last) for facts in runs), default=1.0)
    shared = Range1d(start=0, end=max(end, 1.0), bounds=(0, max(end, 1.0)))
    cross = CrosshairTool(overlay=Span(dimension="height", line_color="#888888", line_width=1))
    found: dict[str, list[figure]] = {}
    for heading, names in GROUPS.items():
        wanted = names or tuple(sorted(named - grouped))
        shown = [_curve(name, runs, sources, shared, cross) for name in wanted if name in named - flat]
        if shown:
            found[heading] = shown
    return found


def _source(facts: Facts) -> ColumnDataSource:
    curves = facts.curves
    columns = {"samples": curves.samples.astype(np.float64), "step": curves.steps.astype(np.int32)}
    for name, values in curves.mean.items():
        columns[name] = values.astype(np.float32)
        if curves.width > 1:
            columns[f"{name}|low"] = curves.low[name].astype(np.float32)
            columns[f"{name}|high"] = curves.high[name].astype(np.float32)
    return ColumnDataSource(columns)


def _empty(title: str, **options) -> figure:
    tools = "xpan,xbox_zoom,xwheel_zoom,reset,save"
    shown = figure(
        title=Title(text=title, text_font_size="12px"),
        height=240,
        sizing_mode="stretch_width",
        tools=tools,
        toolbar_location="above",
        **options,
    )
    shown.toolbar.logo = None
    shown.toolbar.autohide = True
    shown.outline_line_color = None
    shown.grid.grid_line_color = "#eeeeee"
    return shown


def _curve(
    name: str, runs: Sequence[Facts], sources: list[ColumnDataSource], shared: Range1d, cross: CrosshairTool
) -> figure:
    explained = EXPLAINED.get(name, "")
    shown = _empty(f"{name}: {explained}" if explained else name, x_range=shared, x_axis_label="rows seen")
    shown.xaxis.formatter.use_scientific = False  # pyright: ignore[reportAttributeAccessIssue]
    shown.add_tools(cross)
    for index, (facts, source) in enumerate(zip(runs, sources, strict=True)):
        if name not in source.column_names:
            continue
        if f"{name}|low" in source.column_names:
            shown.varea(
                "samples", f"{name}|low", f"{name}|high", source=source, fill_alpha=0.15, fill_color=colour(index)
            )
        line = shown.line("samples", name, source=source, line_color=colour(index), line_width=1.4)
        values = "{0.[0000]a}" if name in ("samples_per_s", "exchanged_bytes") else "{0.[0000]}"
        tips = [("run", facts.name), ("step", "@step{0,0}"), (name, f"@{{{name}}}{values}")]
        shown.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
        _mark(shown, facts, name, index)
    return shown


def _mark(shown: figure, facts: Facts, name: str, index: int) -> None:
    """What guessing costs, steps that were done twice, and changes of the number of workers."""
    curves, begin = facts.curves, 0
    for end, chance in facts.chances:
        if name in chance and begin < curves.last:
            x = [curves.samples_at(begin), curves.samples_at(min(end, curves.last))]
            shown.line(x, [chance[name]] * 2, line_color=colour(index), line_dash="dashed", line_alpha=0.7)
        begin = end
    for first, last in curves.repeated:
        left, right = curves.samples_at(first - 1), curves.samples_at(last)
        shown.add_layout(BoxAnnotation(left=left, right=right, fill_color="#f28e2b", fill_alpha=0.25))
    for step, _ in curves.workers[1:]:
        at = curves.samples_at(step - 1)
        shown.add_layout(Span(location=at, dimension="height", line_color="#999999", line_dash="dotted"))


def evaluations(runs: Sequence[Facts], most: int = 8) -> list[figure]:
    """A figure for each of the first metrics that were measured at several steps, or of several runs; a line for each
    data set and task of a run."""
    rows = [(name, facts.name, step) for facts in runs for step, result in facts.evaluations for name in result.scores]
    names = [name for name in dict.fromkeys(row[0] for row in rows) if len({r for r in rows if r[0] == name}) > 1]
    found = []
    for name in names[:most]:
        scores = [result.scores[name] for facts in runs for _, result in facts.evaluations if name in result.scores]
        limits = {"y_range": Range1d(start=0, end=1)} if all(score.is_share for score in scores) else {}
        shown = _empty(name, x_axis_label="rows seen", x_range=DataRange1d(start=0), **limits)
        shown.xaxis.formatter.use_scientific = False  # pyright: ignore[reportAttributeAccessIssue]
        lines: list[tuple[Facts, list[tuple[int, Result]]]] = []
        for facts in runs:
            own: dict[str, list[tuple[int, Result]]] = {}
            for step, result in facts.evaluations:
                if name in result.scores:
                    own.setdefault(result.place, []).append((step, result))
            lines += [(facts, measured) for measured in own.values()]
        for index, (facts, measured) in enumerate(lines):
            scores = [result.scores[name] for _, result in measured]
            source = ColumnDataSource(
                {
                    "samples": [facts.curves.samples_at(step) for step, _ in measured],
                    "step": [step for step, _ in measured],
                    "value": [score.value for score in scores],
                    "count": [score.count for score in scores],
                    "data": [result.place for _, result in measured],
                }
            )
            shown.line("samples", "value", source=source, line_color=colour(index))
            dots = shown.scatter("samples", "value", source=source, size=7, color=colour(index))
            tips = [("run", facts.name), ("step", "@step{0,0}"), (name, "@value{0.[0000]}"), ("of", "@count{0,0}")]
            shown.add_tools(HoverTool(renderers=[dots], tooltips=[*tips, ("data", "@data")]))
            chance = scores[-1].chance
            if chance is not None:
                shown.add_layout(Span(location=chance, dimension="width", line_color=colour(index), line_dash="dashed"))
        found.append(shown)
    return found


def timeline(facts: Facts) -> figure | None:
    """What happened when, a row for each kind of event; None if the run has told nothing."""
    kinds = [kind for kind in TIMELINE if any(event["event"] == kind for event in facts.events)]
    if not kinds:
        return None
    shown = _empty("", x_axis_type="datetime", y_range=list(reversed(kinds)), x_axis_label="UTC")
    shown.height = 60 + 26 * len(kinds)
    told = [event for event in facts.events if event["event"] in kinds]
    starts = [event for event in facts.events if event["event"] == "workers"]
    ends = [event["at"] for event in facts.events if event["event"] in ("retry", "notice", "resize", "finished",
                                                                        "stopped", "failed")]  # fmt: skip
    for event in starts:  # until the next thing that ends these workers
        until = min((at for at in ends if at > event["at"]), default=facts.events[-1]["at"])
        shown.hbar(y=["workers"], left=event["at"] * 1e3, right=until * 1e3, height=0.5, color="#76b7b2", alpha=0.6)
    source = ColumnDataSource(
        {
            "at": [event["at"] * 1e3 for event in told],
            "kind": [event["event"] for event in told],
            "message": [event["message"] for event in told],
            "colour": ["#e15759" if event["event"] in _RED else "#4e79a7" for event in told],
        }
    )
    dots = shown.scatter("at", "kind", source=source, size=8, color="colour", alpha=0.8)
    tips = [("", "@at{%F %T}"), ("", "@message")]
    shown.add_tools(HoverTool(renderers=[dots], tooltips=tips, formatters={"@at": "datetime"}))
    return shown
