"""Search spaces as text: which values a sweep may try for which fields of a config.

optim.peak_lr=log:1e-5..1e-3      a range, drawn log-uniformly; without `log:` uniformly
model.drop_path=0.1,0.2           a choice; separated by `|` if the values themselves have commas
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmo_ray.config import Config
from vlmo_ray.errors import UserError
from vlmo_ray.fields import kinds_of
from vlmo_ray.overrides import override

if TYPE_CHECKING:
    import optuna

Value = float | int | str


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    def draw(self, trial: optuna.Trial, path: str) -> Value:
        return trial.suggest_categorical(path, self.values)


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    log: bool
    whole: bool  # numbers only

    def draw(self, trial: optuna.Trial, path: str) -> Value:
        if self.whole:
            return trial.suggest_int(path, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(path, self.low, self.high, log=self.log)


Space = dict[str, Choice | Range]


def parse_space(config: Config, texts: Iterable[str]) -> Space:
    """Field -> what it may be. Raises UserError, as `--set` does, for a field or value that `config` cannot have."""
    space: Space = {}
    for text in texts:
        path, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not values:
            raise UserError(f"{text!r} is no search space; write field=log:LOW..HIGH, field=LOW..HIGH or field=A,B")
        if path in space:
            raise UserError(f"{path} has two search spaces; write one, for example {path}=A,B")
        is_range = ".." in values and not re.search(r"[,|/]", values)
        space[path] = found = _range(config, path, values) if is_range else _choice(values)
        for value in found.values if isinstance(found, Choice) else values.rpartition(":")[2].split(".."):
            override(config, [f"{path}={value}"])
    if not space:
        raise UserError("there is nothing to search; give --space, for example --space optim.peak_lr=log:1e-5..1e-3")
    return space


def _choice(values: str) -> Choice:
    found = tuple(value.strip() for value in values.split("|" if "|" in values else ","))
    if len(set(found)) < len(found) or "" in found:
        raise UserError(f"{values!r} names a value twice, or none; write for example 0.1,0.2")
    return Choice(found)


def _range(config: Config, path: str, text: str) -> Range:
    scale, _, ends = text.rpartition(":")
    try:
        low, high = map(float, ends.split(".."))
    except ValueError as error:
        raise UserError(f"{path}={text}: the ends of a range are numbers, for example log:1e-5..1e-3") from error
    if scale not in ("", "log") or not low < high or (scale and low <= 0):
        raise UserError(f"{path}={text}: write log:LOW..HIGH or LOW..HIGH, with LOW < HIGH, for log above 0")
    node, kind = config, None
    for name in path.split("."):
        if not dataclasses.is_dataclass(node) or name not in (kinds := kinds_of(type(node))):
            break  # `override` says what is wrong
        node, kind = getattr(node, name), kinds[name]
    return Range(low, high, scale == "log", kind is int)


def grid(space: Space) -> list[dict[str, Value]]:
    """Every combination if all fields are choices, else []."""
    choices = [values.values for values in space.values() if isinstance(values, Choice)]
    if len(choices) < len(space):
        return []
    return [dict(zip(space, found, strict=True)) for found in itertools.product(*choices)]


def settings_of(params: dict[str, Value]) -> list[str]:
    """As `--set` takes them."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in params.items()]
