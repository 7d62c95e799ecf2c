"""`Batch`: a worker's rows of one step, as torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmo_ray.data.encoders import Column

_TORCH_KEEPS = ("uint8", "bool", "float32", "float64")  # other numbers become int64
_TEXT = ("text_ids", "text_mask", "mlm_ids", "mlm_labels")  # columns [B,T] of texts that are padded at their end


@dataclass(frozen=True)
class Batch:
    """B rows. `batch.image` is `batch.columns["image"]`: an encoder's columns are also attributes.

    Rows with `valid` False are placeholders for records that could not be used. They must count for nothing.
    """

    columns: Mapping[str, Tensor]  # each [B, ...]
    valid: Tensor  # bool [B]
    position: Tensor  # int64 [B], in the global batch; in an evaluation the row in its chunk
    ids: list[str]  # B of them
    problems: list[str]  # B of them: the address of an invalid row and the reason; "" if the row is valid
    # int64 [B], always on the CPU: tokens of each text, 0 without; counted here if it is left out
    text_len: Tensor = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.text_len is None:
            object.__setattr__(self, "text_len", _text_len(self.columns.get("text_mask"), len(self.position)))

    def __len__(self) -> int:
        return len(self.position)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name not in self.columns:
            raise AttributeError(f"a batch has no column {name!r}")
        return self.columns[name]

    @classmethod
    def from_numpy(cls, columns: Mapping[str, np.ndarray]) -> Batch:
        """From the columns of a `data.reader.Reader`; integers are widened, the rest is not copied."""
        own = {"valid", "position", "step", "id", "problem"}
        tensors = {name: _tensor(column) for name, column in columns.items() if name not in own}
        valid, position = _tensor(columns["valid"]), _tensor(columns["position"])
        return cls(tensors, valid, position, list(columns["id"]), list(columns["problem"]))

    @classmethod
    def empty(cls, columns: Mapping[str, Column]) -> Batch:
        """B = 0, for a worker that has no rows in a step."""
        tensors = {name: _tensor(np.zeros((0, *c.shape), c.dtype)) for name, c in columns.items()}
        return cls(tensors, torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), [], [])

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of all, in order; at least one batch is needed, for the shapes."""
        return cls(
            {name: torch.cat([batch.columns[name] for batch in batches]) for name in batches[0].columns},
            torch.cat([batch.valid for batch in batches]),
            torch.cat([batch.position for batch in batches]),
            [name for batch in batches for name in batch.ids],
            [problem for batch in batches for problem in batch.problems],
        )

    def rows(self, wanted: slice | Tensor) -> Batch:
        """Some of the rows: views of a slice, copies by their indices, int64 on the CPU."""
        if isinstance(wanted, slice):
            some = self._each(lambda tensor: tensor[wanted])
            ids, problems = self.ids[wanted], self.problems[wanted]
        else:
            there = wanted.to(self.valid.device)
            some = self._each(lambda tensor: tensor[there])
            ids, problems = ([names[i] for i in wanted.tolist()] for names in (self.ids, self.problems))
        return replace(some, ids=ids, problems=problems, text_len=self.text_len[wanted])

    def trimmed(self) -> Batch:
        """The same rows, their texts cut where the longest one ends: what follows is padding in all of them."""
        if "text_mask" not in self.columns or not len(self):
            return self
        longest = int(self.text_len.max())
        return self.with_columns(**{name: self.columns[name][:, :longest] for name in _TEXT if name in self.columns})

    def with_columns(self, **columns: Tensor) -> Batch:
        """The same rows with other values in some columns."""
        return replace(self, columns={**self.columns, **columns})

    def without_valid(self) -> Batch:
        """The same rows, all invalid."""
        return replace(self, valid=torch.zeros_like(self.valid))

    def to(self, device: torch.device | str) -> Batch:
        """On a GPU by way of page-locked memory: the copy runs while Python goes on."""
        if torch.device(device).type != "cuda":
            return self._each(lambda tensor: tensor.to(device))
        return self._each(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def _each(self, do: Callable[[Tensor], Tensor]) -> Batch:
        columns = {name: do(tensor) for name, tensor in self.columns.items()}
        return replace(self, columns=columns, valid=do(self.valid), position=do(self.position))


def _text_len(mask: Tensor | None, rows: int) -> Tensor:
    """Where the last True of each row is, counted from 1."""
    if mask is None or not rows:
        return torch.zeros(rows, dtype=torch.int64)
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1).cpu()


def _tensor(column: np.ndarray) -> Tensor:
    kept = column.dtype.name in _TORCH_KEEPS
    return torch.from_numpy(column if kept else column.astype(np.int64, copy=False))
