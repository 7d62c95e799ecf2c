"""Configs as text: `--set a.b=c`, JSON of this and older versions, and the differences between two configs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmo_ray.config import Config, ModelConfig, TaskConfig, check, ineffective
from vlmo_ray.errors import UserError
from vlmo_ray.fields import Resume, check_choice, kinds_of

VERSION = 3  # of stored configs; one without a version is of version 1

# version -> path of a field or section -> its path in the next version
_RENAMED: dict[int, dict[str, str]] = {
    1: {
        "data.mlm_probability": "task.mlm_probability",
        "data.patience_s": "data.retry_timeout_s",
        "data.group_steps": "data.shuffle_steps",
        "loss": "task",
    },
    2: {},
}


def override(config: Config, settings: list[str]) -> Config:
    """Applies `a.b=c` settings in order and checks the result.

    Values are JSON where that parses (`true`, `3e-4`, `[[100, 64]]`), else plain strings.
    """
    paths = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r} has no '='; write --set field=value, for example --set seed=2")
        config = _replace(config, path.strip().split("."), text.strip(), path.strip())
        paths.append(path.strip())
    silent = ineffective(config)
    for path in paths:
        if path in silent:
            raise UserError(f"--set {path}=... has no effect here: {silent[path]}")
    return check(config)


def _replace(node: Any, keys: list[str], text: str, path: str) -> Any:
    name, *rest = keys
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        raise UserError(f"unknown field {path!r} ({type(node).__name__} has no {name!r}); {_hint(name, names, path)}")
    value = getattr(node, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            first = dataclasses.fields(value)[0].name
            raise UserError(f"{path!r} is a section; set one of its fields, for example {path}.{first}=...")
        return dataclasses.replace(node, **{name: _replace(value, rest, text, path)})
    if rest:
        raise UserError(f"unknown field {path!r}: {name!r} is a single value")
    return dataclasses.replace(node, **{name: _coerce(_parse(text), kinds_of(type(node))[name], path)})


def _hint(name: str, names: list[str], path: str) -> str:
    if path == "task.kind":
        return "the recipe decides the task: choose a recipe of the task that you want"
    if (renamed := _renamed(path)) != path:
        return f"{path} is now {renamed}"
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _renamed(path: str, version: int = 1) -> str:
    """The current path of the field that `version` calls `path`."""
    for renames in (_RENAMED[past] for past in range(version, VERSION)):
        old = next((old for old in renames if path == old or path.startswith(f"{old}.")), "")
        path = renames[old] + path.removeprefix(old) if old else path
    return path


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _coerce(raw: Any, kind: Any, path: str) -> Any:
    """`raw` (from JSON) as the annotated type. Raises UserError if it does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"{path}={raw!r} is not of the kind {_spell(kind)}")
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in args:
            return None
        return _coerce(raw, next(a for a in args if a is not type(None)), path)
    if origin is Literal:
        check_choice(path, raw, kind)
        return raw
    if origin is tuple:
        if isinstance(raw, str):
            raw = [_parse(item) for item in raw.split(",")]
        if not isinstance(raw, (list, tuple)) or (args[-1] is not Ellipsis and len(raw) != len(args)):
            raise wrong
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else args
        return tuple(_coerce(r, k, path) for r, k in zip(raw, kinds, strict=True))
    if kind is TaskConfig:
        return _build_task(raw, path)
    if dataclasses.is_dataclass(kind):
        return _build(kind, raw, path)
    if kind is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if kind is str:
        return raw if isinstance(raw, str) else json.dumps(raw)
    if type(raw) is not kind:
        raise wrong
    return raw


def _build(kind: Any, raw: Any, path: str) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    if isinstance(raw, (list, tuple)):  # [steps, global_batch]
        raw = dict(zip(names, raw, strict=False)) if len(raw) <= len(names) else raw
    if not isinstance(raw, dict) or set(raw) - set(names):
        raise UserError(f"{path}={raw!r} does not fit {kind.__name__}({', '.join(names)})")
    values = {n: _coerce(v, kinds_of(kind)[n], f"{path}.{n}") for n, v in raw.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{path}={raw!r} lacks a field of {kind.__name__}: {error}") from error


def _build_task(raw: Any, path: str) -> TaskConfig:
    import vlmo_ray.recipes  # noqa: F401 (its modules define the tasks' configs)

    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind not in TaskConfig.kinds:
        raise UserError(f"{path}.kind={kind!r} is no task here; known: {', '.join(sorted(TaskConfig.kinds))}")
    fields = {name: value for name, value in raw.items() if name != "kind"}
    return _build(TaskConfig.kinds[kind], fields, path)


def _spell(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)


def to_dict(config: Config | ModelConfig) -> dict[str, Any]:
    """The JSON form; `from_dict` and `model_from_dict` are the inverses."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(config, Config):
        raw = {"version": VERSION} | raw | {"task": {"kind": config.task.kind} | raw["task"]}
    return raw


def from_dict(raw: dict[str, Any]) -> Config:
    """The config that `to_dict` of this or an older version wrote. Raises UserError for a newer version."""
    version = raw.get("version", 1)
    if version > VERSION:
        raise UserError(
            f"the config is of version {version} and this program reads up to {VERSION}; use a newer vlmo_ray"
        )
    raw = {name: value for name, value in raw.items() if name != "version"}
    if version < VERSION:
        raw = _nested({_renamed(path, version): value for path, value in flat(raw)})
    if version == 1:  # pre-training was the only task
        raw.setdefault("task", {})["kind"] = "pretraining"
    if version < 3:  # there was one decoder
        raw.setdefault("data", {})["decoder"] = "pillow"
    return _build(Config, raw, "config")


def flat(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every single value in nested sections."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        section = out
        for inner in sections:
            section = section.setdefault(inner, {})
        section[name] = value
    return out


def model_from_dict(raw: dict[str, Any]) -> ModelConfig:
    return _build(ModelConfig, raw, "model")


@dataclass(frozen=True)
class Difference:
    """A field that differs between two configs; `resume` is its mark (`fields.Resume`)."""

    path: str
    old: Any
    new: Any
    resume: Resume

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


def differences(a: Any, b: Any, prefix: str = "", resume: Resume = "ask") -> list[Difference]:
    """The differing fields of two configs of one type; `resume` is the mark of fields that have none."""
    if isinstance(a, TaskConfig) and a.kind != b.kind:
        return [Difference(f"{prefix}kind", a.kind, b.kind, "fixed")]
    found = []
    for field in dataclasses.fields(a):
        old, new = getattr(a, field.name), getattr(b, field.name)
        mark = field.metadata.get("resume") or resume
        if dataclasses.is_dataclass(old):
            found += differences(old, new, f"{prefix}{field.name}.", mark)
        elif old != new:
            found.append(Difference(f"{prefix}{field.name}", old, new, mark))
    return found
