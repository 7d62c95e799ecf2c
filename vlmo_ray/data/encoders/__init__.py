"""Encoders: from a stored record to the NumPy columns of one row.

An encoder is sent to data processes, so it is a frozen dataclass. Nothing here imports torch, which would cost each
data process 380 MB. A task names its encoder (`Task.encoder`); an evaluation may name another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vlmo_ray import rng
from vlmo_ray.data.schema import Record

Row = dict[str, Any]  # column -> value of one row


@dataclass(frozen=True)
class Column:
    """The type of a column, and its value in a row that cannot be used."""

    dtype: str
    shape: tuple[int, ...] = ()  # of one row
    fill: Any = 0  # in a row that cannot be used: a number, or an array of `shape`

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Draw:
    """The place of a row in its run. Every random number of the row is a function of it."""

    seed: int
    step: int
    position: int  # in the global batch of that step

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator for this row alone; two purposes draw independently."""
        return rng.generator(self.seed, purpose, self.step, self.position)


class Encoder:
    """Callable, picklable, without torch: a frozen dataclass derived from this."""

    fields: ClassVar[tuple[str, ...]]  # the stored columns that the encoder reads

    @property
    def columns(self) -> Mapping[str, Column]:
        """The columns of a row."""
        raise NotImplementedError

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        """Of label and answer columns, the values that the model was made for, in order; others are refused."""
        return {}

    def __call__(self, record: Record, draw: Draw | None) -> Row:
        """The row of a record. `draw` None means evaluation: no augmentation and no masking.

        Raises RecordError if the record cannot be used.
        """
        raise NotImplementedError
