"""What makes tomorrow's step equal to today's, beside the weights and the optimizer."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmo_ray.config import Config
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import differences, from_dict, to_dict


def versions() -> dict[str, str]:
    import numpy
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


@dataclass(frozen=True)
class TrainState:
    """`step` is the number of optimizer steps done, and with the config the whole position in the data."""

    step: int
    config: dict[str, Any]
    fingerprint: str  # of the data set
    attempts: list[tuple[int, str]] = field(default_factory=list)  # (first step, name) of the starts behind it
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def of(
        cls, step: int, config: Config, fingerprint: str, attempts: list[tuple[int, str]] | None = None
    ) -> TrainState:
        return cls(step, to_dict(config), fingerprint, attempts or [])

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load_state_dict(cls, state: dict[str, Any]) -> TrainState:
        return cls(**state | {"attempts": [(first, name) for first, name in state["attempts"]]})

    @property
    def attempt(self) -> str:
        """The start of the run that made it."""
        return self.attempts[-1][1]

    def continue_with(self, config: Config, fingerprint: str, accept_changes: bool = False) -> list[str]:
        """The differences to a run of `config` on the data of `fingerprint` that is to carry on from here.

        Raises a UserError with them if there are any, unless told to accept them. A difference that weights would not
        fit is an error in any case. What each field allows stands beside it in `config.py`.
        """
        changed = [diff for diff in differences(from_dict(self.config), config) if diff.resume != "free"]
        misfits = any(diff.resume == "fixed" for diff in changed)
        told = [str(diff) for diff in changed]
        if fingerprint != self.fingerprint:
            told.append(f"data: fingerprint {self.fingerprint[:12]} -> {fingerprint[:12]}")
        if misfits or (told and not accept_changes):
            otherwise = "" if misfits else ", or go on with them by --accept-changes"
            raise UserError(
                f"the checkpoint of step {self.step} was made with other settings: {'; '.join(told)}. "
                f"Take them back, or give another --name to start afresh{otherwise}"
            )
        return told
