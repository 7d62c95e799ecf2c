"""Joining or starting Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS` (set inside `ray job submit`), or starts one on this machine and ends it.

    An already initialised Ray is used as it is. A running local cluster is never joined by accident. `dashboard`:
    start it on a local cluster too; Ray Train asks it whether a run's controller lives.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": dashboard, "logging_level": "WARNING"} if address == "local" else {}
    ray.init(address=address, **local)
    try:
        yield
    finally:
        ray.shutdown()
