"""Recipes: `RECIPES` holds every public function in this folder whose return annotation is `Config`.

The name of a recipe is that of its function. Nothing else registers it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable

from vlmo_ray.config import Config, check
from vlmo_ray.errors import UserError


def _discover() -> dict[str, Callable[[], Config]]:
    found: dict[str, Callable[[], Config]] = {}
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == info.name
            if own and not name.startswith("_") and typing.get_type_hints(function).get("return") is Config:
                assert name not in found, f"two recipes are called {name}"
                found[name] = function
    return found


RECIPES: dict[str, Callable[[], Config]] = _discover()


def recipe(name: str) -> Config:
    """The checked config of a recipe. Raises UserError if there is no recipe of that name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no recipe {name!r}; {hint}known: {', '.join(RECIPES)}")
    return check(RECIPES[name]())
