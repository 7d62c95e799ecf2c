"""Is the run well? Sentences for a person, each with what to do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmo_ray.report.facts import Facts

Level = Literal["good", "warning", "bad"]

# what is remarkable: shares of the last steps, of all rows, of all steps
_WAIT, _MASKED, _REPEATED, _SAME = 0.1, 0.01, 0.05, 0.05
_AT_CHANCE = 0.98  # of what guessing costs
_QUIET_S, _QUIET_STEPS = 120.0, 20  # without a word, both


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run."""

    level: Level
    sentence: str
    remedy: str = ""


def findings(facts: Facts) -> list[Finding]:
    """What is to be said, the worst first."""
    found = [_state(facts), *_checkpoints(facts), *_learning(facts), *_speed(facts), *_rows(facts), *_faults(facts)]
    order = {"bad": 0, "warning": 1, "good": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 3 min, 2 h 5 min, 4 d 3 h."""
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _state(facts: Facts) -> Finding:
    step, total = facts.curves.last, facts.total_steps
    at, left = f"step {step:,} of {total:,}", facts.seconds_left
    again = f"Start it again by the same command: it goes on from step {max(facts.checkpoints, default=0):,}."
    ago = "" if facts.heard_at is None else f", last heard {duration(facts.read_at - facts.heard_at)} ago"
    if facts.state == "finished":
        return Finding("good", f"The run is finished: all {total:,} steps are done.")
    if facts.state == "running":
        return Finding("good", f"The run goes on: {at}" + ("." if left is None else f", {duration(left)} left."))
    told = next((e["message"] for e in reversed(facts.events) if e["event"] in ("stopped", "failed")), "")
    if facts.state == "stopped":
        return Finding("warning", f"The run was stopped at {at}: {told}", again)
    if facts.state == "failed":
        return Finding("bad", f"The run failed at {at}: {told}", f"Mend what it names. {again}")
    return Finding("bad", f"Nobody trains the run: it is at {at}{ago}.", again)


def _checkpoints(facts: Facts) -> list[Finding]:
    if not facts.checkpoints:
        return [Finding("warning", "There is no checkpoint yet: a failure now repeats everything.")]
    newest, every = max(facts.checkpoints), facts.config.checkpoint_every
    behind = facts.curves.last - newest
    if behind > 2 * every:
        return [
            Finding(
                "warning",
                f"The newest checkpoint is {behind:,} steps old, although there is one every {every:,}.",
                "Look at the time that uploads take below, and at the storage.",
            )
        ]
    size = sum(facts.checkpoints.values()) / 1e9
    kept = f"{len(facts.checkpoints)} are kept, {size:.2f} GB"
    return [Finding("good", f"The newest checkpoint is of step {newest:,}; {kept}.")]


def _learning(facts: Facts) -> list[Finding]:
    curves, found = facts.curves, []
    if curves.last < facts.total_steps / 10 or len(curves.steps) < 10:
        return []  # too early to say
    end = next((chance for last, chance in facts.chances if curves.last <= last), {})
    tail = slice(-max(1, len(curves.steps) // 20), None)
    for name, chance in end.items():
        values = curves.mean.get(name)
        if values is None or not np.isfinite(values[tail]).any():
            continue
        now = float(np.nanmean(values[tail]))
        if now < _AT_CHANCE * chance:
            continue
        remedy = "Compare the learning rate and the warm-up with the recipe; init_std and LayerScale of small models."
        if name == "itm":
            remedy = (
                "Mined negatives become harder as the contrast improves, so this alone says little: measure it by "
                "vlmo evaluate RUN --task matching."
            )
        found.append(Finding("warning", f"{name} is {now:.3f}, and guessing costs {chance:.3f}.", remedy))
    return found


def _speed(facts: Facts) -> list[Finding]:
    recent = facts.curves.recent
    quiet = facts.read_at - (facts.heard_at or facts.read_at)
    each = recent.get("step_s", math.inf)
    found = []
    if recent.get("data_wait", 0) > _WAIT:
        found.append(
            Finding(
                "warning",
                f"Workers wait for data during {recent['data_wait']:.0%} of a step.",
                "Raise cluster.data_cpus_per_worker, or look at the rate of the storage.",
            )
        )
    if facts.state == "running" and quiet > max(
        _QUIET_S, _QUIET_STEPS * each, 2 * facts.config.checkpoint_every * each
    ):
        found.append(
            Finding("warning", f"The run has told nothing for {duration(quiet)}.", "Look at the log of its job.")
        )
    return found


def _rows(facts: Facts) -> list[Finding]:
    found, masked = [], sum(reason.count for reason in facts.masked.values())
    rows = max(facts.curves.samples_at(facts.curves.last), masked)  # what was masked may be stored before the metrics
    if masked:
        level: Level = "warning" if masked > _MASKED * rows else "good"
        remedy = "The table of masked records says which and why." if level == "warning" else ""
        found.append(Finding(level, f"{masked:,} rows could not be read and were masked, {masked / rows:.2%}.", remedy))
    same = facts.curves.recent.get("same_share", 0)
    if same > _SAME:
        found.append(
            Finding(
                "warning",
                f"{same:.1%} of all pairs of rows share their image or text, and are no negatives.",
                "The data set has many duplicates: captions that many images have, or images with many captions.",
            )
        )
    return found


def _faults(facts: Facts) -> list[Finding]:
    curves, found = facts.curves, []
    again = sum(last - first + 1 for first, last in curves.repeated)
    if curves.last and again > _REPEATED * curves.last:
        found.append(
            Finding(
                "warning",
                f"Steps that were done twice: {again:,}, {again / curves.last:.0%} of all.",
                "Lower checkpoint_every, or take nodes that live longer.",
            )
        )
    skipped = sum(event["event"] == "skipped" for event in facts.events)
    if skipped:
        found.append(
            Finding(
                "warning",
                f"Steps left out because loss or gradient were not finite: {skipped:,}.",
                "Lower optim.peak_lr, or set optim.clip_norm.",
            )
        )
    return found
