"""Joins or starts a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vlmo_ray.errors import UserError


def quiet_ray() -> None:
    """Ray says of every pipeline that it begins and ends, and of every local cluster that it has a token."""
    names = ("data._internal.execution.streaming_executor", "data._internal.logging", "data._internal.progress")
    for name in (*names, "_private.authentication.authentication_token_setup"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS` (`ray job submit` sets it), or runs one on this machine inside the block.

    Uses Ray as it is if it is already initialised. Never joins another cluster of this machine by accident. `dashboard`
    starts it on a local cluster too; Ray Train asks it whether a run's controller is alive.
    """
    import ray

    quiet_ray()
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": dashboard, "logging_level": "WARNING"} if address == "local" else {}
    try:
        ray.init(address=address, **local)
    except Exception as error:  # Ray raises plain exceptions too
        reason = " ".join(str(error).split())[:300]
        what = (
            "Ray did not start on this machine"
            if address == "local"
            else f"the Ray cluster at {address} cannot be used"
        )
        raise UserError(
            f"{what}: {reason}. Look at the load and the memory of its nodes, and at RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
