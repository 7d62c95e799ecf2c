"""Configs as text: `--set a.b=c` over them, to JSON and back, and what differs between two."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal

from vlmo_ray.config import Config, ModelConfig, check, ineffective
from vlmo_ray.errors import UserError


def override(config: Config, settings: list[str]) -> Config:
    """Applies `a.b=c` settings in order and checks the result.

    Values are JSON where that parses (`true`, `3e-4`, `[[100, 64]]`), else plain strings.
    """
    paths = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(
                f"--set {setting!r} has no '='; write --set field=value, for example --set seed=2"
            )
        config = _replace(config, path.strip().split("."), text.strip(), path.strip())
        paths.append(path.strip())
    silent = ineffective(config)
    for path in paths:
        if path in silent:
            raise UserError(f"--set {path}=... has no effect here: {silent[path]}")
    return check(config)


def _replace(node: Any, parts: list[str], text: str, path: str) -> Any:
    name, *rest = parts
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
        raise UserError(f"unknown field {path!r} ({type(node).__name__} has no {name!r}); {hint}")
    value = getattr(node, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            raise UserError(
                f"{path!r} is a group of fields; set one of them, for example {path}.{_first(value)}=..."
            )
        return dataclasses.replace(node, **{name: _replace(value, rest, text, path)})
    if rest:
        raise UserError(f"unknown field {path!r}: {name!r} is a single value")
    return dataclasses.replace(
        node, **{name: _coerce(_parse(text), typing.get_type_hints(type(node))[name], path)}
    )


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _first(node: Any) -> str:
    return dataclasses.fields(node)[0].name


def _coerce(raw: Any, kind: Any, path: str) -> Any:
    """`raw` (from JSON) as the annotated type, or a UserError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"{path}={raw!r} is not of the kind {_spell(kind)}")
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in args:
            return None
        return _coerce(raw, next(a for a in args if a is not type(None)), path)
    if origin is Literal:
        if raw not in args:
            raise UserError(f"{path}={raw!r} must be one of {', '.join(map(repr, args))}")
        return raw
    if origin is tuple:
        if isinstance(raw, str):
            raw = [_parse(part) for part in raw.split(",")]
        if not isinstance(raw, (list, tuple)) or (args[-1] is not Ellipsis and len(raw) != len(args)):
            raise wrong
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else args
        return tuple(_coerce(r, k, path) for r, k in zip(raw, kinds, strict=True))
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
    hints = typing.get_type_hints(kind)
    values = {n: _coerce(v, hints[n], f"{path}.{n}") for n, v in raw.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{path}={raw!r} lacks a field of {kind.__name__}: {error}") from error


def _spell(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-able form; `from_dict` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(raw: dict[str, Any]) -> Config:
    return _build(Config, raw, "config")


def model_from_dict(raw: dict[str, Any]) -> ModelConfig:
    return _build(ModelConfig, raw, "model")


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """`field: old -> new` lines between two configs of the same type."""
    lines = []
    for f in dataclasses.fields(a):
        old, new = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            lines += differences(old, new, f"{prefix}{f.name}.")
        elif old != new:
            lines.append(f"{prefix}{f.name}: {old!r} -> {new!r}")
    return lines
