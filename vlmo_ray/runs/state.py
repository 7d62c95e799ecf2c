"""The state of a run beside weights and optimizer: what makes a step after a resume equal to one without."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmo_ray.config import Config
from vlmo_ray.data.order import schedule_of, span
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import differences, from_dict, to_dict


def versions() -> dict[str, str]:
    import numpy
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


@dataclass(frozen=True)
class TrainState:
    """`step` is the number of optimizer steps done. With the config it is also the position in the data."""

    step: int
    config: dict[str, Any]
    fingerprint: str  # of the data set
    attempts: list[tuple[int, str]] = field(default_factory=list)  # (first step, name) of every start so far
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
        attempts = [(first, name) for first, name in state["attempts"]]  # JSON made them lists
        return cls(**{name: value for name, value in state.items() if name != "attempts"}, attempts=attempts)

    @property
    def attempt(self) -> str:
        """The start of the run that wrote this state."""
        return self.attempts[-1][1]

    def continue_with(self, config: Config, fingerprint: str, accept_changes: bool = False) -> list[str]:
        """Checks that a run of `config` on the data of `fingerprint` may continue from here; returns the differences.

        Raises UserError that lists them if there are any, unless `accept_changes`. A difference that the weights would
        not fit is always an error, and so is a run that would end before this step. `config.py` marks beside each field
        what a resumed run may do with it.
        """
        if self.step > config.total_steps:
            raise UserError(
                f"the checkpoint of step {self.step} is behind the last step, {config.total_steps}; give more steps in "
                "phases, or another --name to start afresh"
            )
        changed = [diff for diff in differences(from_dict(self.config), config) if diff.resume != "free"]
        misfits = any(diff.resume == "fixed" for diff in changed)
        told = [str(diff) for diff in changed]
        if fingerprint != self.fingerprint:
            told.append(f"data: fingerprint {self.fingerprint[:12]} -> {fingerprint[:12]}")
        if dealt_anew := self._dealt_anew(config):
            told.append(dealt_anew)
        if misfits or (told and not accept_changes):
            otherwise = "" if misfits else ", or go on with them by --accept-changes"
            raise UserError(
                f"the checkpoint of step {self.step} was made with other settings: {'; '.join(told)}. "
                f"Undo them, or give another --name to start afresh{otherwise}"
            )
        return told

    def _dealt_anew(self, config: Config) -> str:
        """What becomes of rows that are shuffled together, if this step stands among them and `config` deals them to
        other places; else ""."""
        before = from_dict(self.config)
        if not 0 < self.step < config.total_steps:
            return ""

        def dealt(config: Config) -> tuple[range, int, int]:
            schedule = schedule_of(config)
            steps = span(schedule, config.data.shuffle_steps, self.step - 1)
            return steps, schedule.batch_size(self.step - 1), config.slice_size

        old, new = dealt(before), dealt(config)
        if old == new or self.step == old[0].stop == new[0].stop:
            return ""
        return (
            f"rows: those of steps {old[0].start} to {old[0].stop} are shuffled anew, so some that were consumed come "
            "again, and others not in this epoch"
        )
