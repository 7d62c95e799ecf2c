"""Which pairs of a global batch may be held against which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What must be known of all N pairs of a global batch to compare any two; gathered once a step."""

    image_key: Tensor  # int64 [N], equal for the same image
    text_key: Tensor  # int64 [N], equal for the same normalised text
    valid: Tensor  # bool [N], False for a pair that could not be read
    first: int  # position of this worker's first row
    rows: int  # how many rows are this worker's

    @property
    def local(self) -> slice:
        return slice(self.first, self.first + self.rows)

    def may_oppose(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Bool `[rows, columns]`: may one be a negative of the other? Both are positions; the answer is symmetric.

        Both must be valid, and they must share neither image nor text: those are not negatives but true pairs.
        """
        differ = self.image_key[rows, None] != self.image_key[None, columns]
        differ &= self.text_key[rows, None] != self.text_key[None, columns]
        differ &= self.valid[rows, None]
        return differ.logical_and_(self.valid[None, columns])

    def compared(self, columns: slice) -> Tensor:
        """Bool `[b, columns]`: the columns in a local row's softmax, which are those that oppose it and its own.

        A row that is not valid is compared with itself alone, which has loss and gradient 0.
        """
        counted = self.may_oppose(self.local, columns)
        counted.diagonal(self.first - columns.start).fill_(True)
        return counted


def columns_of(total: int, chunk: int, start: int = 0) -> list[slice]:
    """Slices of at most `chunk` that cover `range(start, total)`."""
    return [slice(begin, min(begin + chunk, total)) for begin in range(start, total, chunk)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the precision of their inputs: neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened(*tensors: Tensor) -> list[Tensor]:
    """In float32, or float64 where they are."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
