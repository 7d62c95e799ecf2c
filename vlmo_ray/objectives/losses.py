"""The named terms of the pre-training objective and their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmo_ray.config import LossConfig


@dataclass
class Losses:
    """Scalars. Each is the sum over this worker's items divided by the count of items in the whole step."""

    itc: Tensor
    itc_vl: Tensor
    itm: Tensor
    mlm: Tensor

    def total(self, weights: LossConfig) -> Tensor:
        """Weighted sum; the contrastive term is the mean of the two branches."""
        return weights.itc * 0.5 * (self.itc + self.itc_vl) + weights.itm * self.itm + weights.mlm * self.mlm
