"""Which pairs of a global batch may be held against which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What it takes to compare any two of the N pairs of a global batch; gathered once a step."""

    image_key: Tensor  # int64 [N], equal for equal images
    text_key: Tensor  # int64 [N], equal for equal normalised texts
    valid: Tensor  # bool [N], False for a pair that could not be read
    first: int  # position of this worker's first row
    rows: int  # how many rows are this worker's

    @property
    def local(self) -> slice:
        return slice(self.first, self.first + self.rows)

    def may_oppose(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Bool `[rows, columns]`: whether one may be a negative of the other, which is symmetric. Both are positions.

        Both must be valid and must not share image or text: pairs that do are true pairs, not negatives.
        """
        differ = self.image_key[rows, None] != self.image_key[None, columns]
        differ &= self.text_key[rows, None] != self.text_key[None, columns]
        differ &= self.valid[rows, None]
        return differ.logical_and_(self.valid[None, columns])

    def compared(self, columns: slice) -> Tensor:
        """Bool `[b, columns]`: the columns in a local row's softmax: its own and those that may oppose it.

        An invalid row is compared only with itself, which gives loss and gradient 0.
        """
        counted = self.may_oppose(self.local, columns)
        counted.diagonal(self.first - columns.start).fill_(True)
        return counted

    def same_share(self) -> Tensor:
        """Of the pairs of two valid rows, the share that the same image or text keeps from being negatives; 0-d."""
        number = self.valid.sum()
        both = self.image_key * -7046029254386353131 + self.text_key  # wraps; equal only where both are
        image, text, twice = (_equal(key, self.valid) for key in (self.image_key, self.text_key, both))
        return (image + text - twice) / (number * (number - 1)).clamp(min=1)


def _equal(key: Tensor, valid: Tensor) -> Tensor:
    """How many ordered pairs of two different valid rows have equal keys, float64 0-d; without waiting for a GPU."""
    number, key = valid.sum(), key.contiguous()
    largest = torch.iinfo(torch.int64).max
    ordered = torch.where(valid, key, largest).sort().values  # the valid ones come first
    end = torch.searchsorted(ordered, key, right=True).clamp(max=number)
    count = end - torch.searchsorted(ordered, key)
    return ((count - 1) * valid).sum().double()


def columns_of(total: int, size: int, start: int = 0) -> list[slice]:
    """Blocks of at most `size` that cover `range(start, total)`."""
    return [slice(begin, min(begin + size, total)) for begin in range(start, total, size)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Computes products in the precision of their inputs: without autocast and TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32; float64 ones stay as they are."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
