"""`PairBatch`: the rows of one step that a worker works on, as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch


@dataclass(frozen=True)
class PairBatch:
    """B image-text pairs. Rows with `valid` False are placeholders for pairs that could not be read.

    Two pairs with the same `image_key` show the same image, two with the same `text_key` say the same; they
    are never negatives of each other.
    """

    image: torch.Tensor  # uint8 [B, 3, H, W]
    text_ids: torch.Tensor  # int64 [B, T]
    text_mask: torch.Tensor  # bool [B, T], True = a token
    mlm_ids: torch.Tensor  # int64 [B, T], text_ids with words masked
    mlm_labels: torch.Tensor  # int64 [B, T], the true id at masked places, -100 elsewhere
    image_key: torch.Tensor  # int64 [B]
    text_key: torch.Tensor  # int64 [B]
    valid: torch.Tensor  # bool [B]
    position: torch.Tensor  # int64 [B], in the global batch
    ids: list[str]  # B of them
    problems: list[str]  # B of them: why a row is not valid, with its address; empty where it is

    def __len__(self) -> int:
        return len(self.position)

    @classmethod
    def from_numpy(cls, columns: Mapping[str, np.ndarray]) -> PairBatch:
        """From the columns of `data.parts.TrainReader`; integers are widened, the rest is not copied."""
        tensors = {
            name: torch.from_numpy(columns[name].astype(np.int64, copy=False))
            for name in ("text_ids", "mlm_ids", "mlm_labels", "image_key", "text_key", "position")
        }
        tensors |= {name: torch.from_numpy(columns[name]) for name in ("image", "text_mask", "valid")}
        return cls(**tensors, ids=list(columns["id"]), problems=list(columns["problem"]))

    @classmethod
    def empty(cls, image_size: int, text_len: int) -> PairBatch:
        """B = 0, for a worker that has no rows in a step."""
        text = torch.zeros(0, text_len, dtype=torch.int64)
        number, flag = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        return cls(
            image=torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8),
            text_ids=text, text_mask=text.bool(), mlm_ids=text, mlm_labels=text,
            image_key=number, text_key=number, valid=flag, position=number, ids=[], problems=[],
        )  # fmt: skip

    @classmethod
    def concatenate(cls, batches: Sequence[PairBatch]) -> PairBatch:
        """The rows of all, in order; at least one batch is needed, for the shapes."""
        joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in _TENSORS}
        ids = [name for batch in batches for name in batch.ids]
        return cls(**joined, ids=ids, problems=[problem for batch in batches for problem in batch.problems])

    def rows(self, wanted: slice) -> PairBatch:
        """Some of the rows, as views."""
        tensors = {name: getattr(self, name)[wanted] for name in _TENSORS}
        return replace(self, **tensors, ids=self.ids[wanted], problems=self.problems[wanted])

    def without_targets(self) -> PairBatch:
        """The same rows with no masked word to predict."""
        return replace(self, mlm_labels=torch.full_like(self.mlm_labels, -100))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **tensors)

    def pin_memory(self) -> PairBatch:
        """In page-locked memory, from which `to(device, non_blocking=True)` overlaps with other work."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


_TENSORS = [f.name for f in fields(PairBatch) if f.name not in ("ids", "problems")]
