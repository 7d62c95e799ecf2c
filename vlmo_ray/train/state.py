"""What makes tomorrow's step equal to today's, beside the weights and the optimizer."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmo_ray.config import Config
from vlmo_ray.errors import UserError
from vlmo_ray.settings import differences, from_dict, to_dict

# Fields that may differ between a checkpoint and the run that continues it: they change no number.
FREE = (
    "cluster.", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "micro_batch", "init", "audit",
    "data.patience_s", "data.bad_shards",
)  # fmt: skip


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
    attempts: list[tuple[int, str]] = field(
        default_factory=list
    )  # (first step, name) of the starts behind it
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

    def continue_with(self, config: Config, fingerprint: str) -> None:
        """Raises a UserError with the differences if a run of `config` on this data cannot carry on from here."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the checkpoint of step {self.step} belongs to other data (fingerprint {self.fingerprint[:12]}, "
                f"now {fingerprint[:12]}); give the data set it was trained on, or another --name to start afresh"
            )
        changed = [line for line in differences(from_dict(self.config), config) if not line.startswith(FREE)]
        if changed:
            raise UserError(
                f"the checkpoint of step {self.step} was made with other settings: {'; '.join(changed)}. "
                "Take them back, or give another --name to start afresh"
            )
