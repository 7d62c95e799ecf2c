"""The named terms of the pre-training objective and their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Weights(Protocol):
    """Of the terms; a `PretrainingConfig` is one."""

    @property
    def itc(self) -> float: ...
    @property
    def itm(self) -> float: ...
    @property
    def mlm(self) -> float: ...


@dataclass
class Losses:
    """Scalars. Each is the sum over this worker's items divided by the count of items in the whole step."""

    itc: Tensor
    itc_vl: Tensor
    itm: Tensor
    mlm: Tensor

    def total(self, weights: Weights) -> Tensor:
        """Weighted sum; the contrastive term is the mean of the two branches."""
        return weights.itc * 0.5 * (self.itc + self.itc_vl) + weights.itm * self.itm + weights.mlm * self.mlm
