"""One file per task, found by name: `tasks/<kind>.py` defines the `Task` and the `Evaluation` of that kind."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, TypeVar

from vlmo_ray.config import Config
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.task import Evaluation, Task, ZeroShot

_NO_TASKS = ("task", "metrics")  # modules here that hold no task


def kinds() -> list[str]:
    """The names of all tasks, also of those that can only be evaluated."""
    return [info.name for info in pkgutil.iter_modules(__path__) if info.name not in _NO_TASKS]


def build_task(model: VLMo, config: Config, schema: Schema) -> Task:
    """The task of a config around its model, for data of this schema; its own heads at their starting point."""
    found = _defined(config.task.kind, Task)
    assert found is not None, f"tasks/{config.task.kind}.py defines no Task"
    return found(model, config, schema)


def build_evaluation(kind: str, model: VLMo, schema: Schema, **options: Any) -> Evaluation:
    """The evaluation called `kind`, on data of this schema, of any model that has the heads for it.

    Raises UserError for other names, also of options.
    """
    if kind not in kinds():
        raise UserError(f"there is no task {kind!r}; known: {', '.join(kinds())}")
    found = _defined(kind, ZeroShot)
    if found is None:
        raise UserError(
            f"{kind} needs weights that were trained for it: evaluate a run of a {kind} recipe with --task {kind}"
        )
    known = dict(list(inspect.signature(found).parameters.items())[2:])
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{name!r} is not an option of {kind}; it has {', '.join(known) or 'none'}")
        if type(known[name].default) is int and type(value) is not int:
            raise UserError(f"{name}={value!r} of {kind} is not a whole number")
    return found(model, schema, **options)


T = TypeVar("T")


def _defined(kind: str, base: type[T]) -> type[T] | None:
    """The subclass of `base` that the module of `kind` defines, or None."""
    module = importlib.import_module(f"{__name__}.{kind}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    assert len(found) < 2, f"{module.__name__} defines several of {base.__name__}"
    return found[0] if found else None
