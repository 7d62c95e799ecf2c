"""Fields of a config: bounds, choices, and whether a resumed run may change them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, Literal

from vlmo_ray.errors import UserError

# Whether a run that resumes from a checkpoint may change a field. "free": yes, the field changes no number of the run.
# "ask": only with --accept-changes. "fixed": no, the weights would not fit.
Resume = Literal["free", "ask", "fixed"]


def setting(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    remedy: str = "",
    resume: Resume | None = None,
) -> Any:
    """A dataclass field with the bounds that `check_fields` enforces; its error message ends with `remedy`.

    With `resume` None, a field has the mark of its section; at the top level, "ask".
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"bounds": bounds, "remedy": remedy, "resume": resume}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(section: Any, prefix: str) -> None:
    """Raises UserError for the first field of the dataclass that is out of bounds or not one of its choices."""
    for field in dataclasses.fields(section):
        path, value = prefix + field.name, getattr(section, field.name)
        kind = kinds_of(type(section))[field.name]
        if typing.get_origin(kind) is Literal:
            check_choice(path, value, kind)
        if value is not None and (bounds := field.metadata.get("bounds")):
            _check_bounds(path, value, bounds, field.metadata["remedy"])


@functools.cache
def kinds_of(section: type) -> dict[str, Any]:
    """Field -> resolved type."""
    return typing.get_type_hints(section)


def check_choice(path: str, value: Any, kind: Any) -> None:
    """Raises UserError if `value` is not one of the choices of the Literal `kind`."""
    if value not in typing.get_args(kind):
        raise UserError(f"{path}={value!r} must be one of {', '.join(map(repr, typing.get_args(kind)))}")


def _check_bounds(path: str, value: Any, bounds: dict[str, float | None], remedy: str) -> None:
    at_least, above, at_most, below = bounds.values()
    fits = (  # NaN fits no bound
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if fits:
        return
    if at_least is not None and (at_most is not None or below is not None):
        words = [f"from {at_least} to " + (f"below {below}" if at_most is None else f"{at_most}")]
    else:
        words = [f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items() if bound is not None]
    raise UserError(f"{path}={value} must be {' and '.join(words)}" + (f"; {remedy}" if remedy else ""))
