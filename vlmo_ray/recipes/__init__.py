"""Recipes are functions that return a `Config`; `RECIPES` names them all."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from vlmo_ray.config import Config, check
from vlmo_ray.errors import UserError
from vlmo_ray.recipes import pretrain, tiny

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        pretrain.pretrain_base,
        pretrain.pretrain_base_plus,
        pretrain.pretrain_large,
        pretrain.pretrain_1b,
        tiny.tiny,
        tiny.demo,
        tiny.pretrain_1b_tiny,
        tiny.small_photos,
        tiny.medium_photos,
    )
}


def recipe(name: str) -> Config:
    """The checked config of a recipe; UserError for a name that does not exist."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no recipe {name!r}; {hint}known: {', '.join(RECIPES)}")
    return check(RECIPES[name]())
