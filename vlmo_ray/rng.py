"""Stateless randomness: every draw is a function of (seed, purpose, step, row position, draw index).

Nothing here has state, so a draw can be repeated anywhere: in another process, on another number of workers, after a
resume, or in the second forward of a recomputation. The NumPy and the PyTorch version return the same bits. The mixing
function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    >>> key = stream(seed=1, purpose="drop_path", step=7)
    >>> uniforms(key, [0, 5], 2)[1] == uniforms(key, [5], 2)[0]
    array([ True,  True])
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # data tasks import this module, and must not import torch
    import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def stream(seed: int, purpose: str, step: int = 0) -> int:
    """The 64-bit key of one family of draws; different purposes give independent draws."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_text(text: str) -> int:
    """A 63-bit hash of a string, equal in every process (Python's `hash` is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, step: int, position: int) -> np.random.Generator:
    """A NumPy generator for one row, for code that draws an unknown number of values."""
    return np.random.Generator(np.random.Philox(key=stream(seed, f"{purpose}@{position}", step)))


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def uniforms(key: int, positions, n: int) -> np.ndarray:
    """Draws in [0, 1) with 24 bits each, `[len(positions), n]` float64; row b belongs to `positions[b]`."""
    with np.errstate(over="ignore"):
        rows = mix(np.asarray(positions, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
        draws = mix(rows[:, None] + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    return (draws >> np.uint64(40)).astype(np.float64) * 2.0**-24


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # torch has no unsigned 64-bit arithmetic: shift arithmetically, then clear the copied sign bits
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_torch(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def uniforms_torch(key: int, positions: torch.Tensor, n: int, first: int = 0) -> torch.Tensor:
    """`uniforms` on the device of `positions` (int64 `[B]`): float32 `[B, n]`, draws first .. first + n - 1."""
    import torch

    rows = _mix_torch(positions * _signed(_GOLDEN) + _signed(key))
    index = torch.arange(first + 1, first + n + 1, device=positions.device, dtype=torch.int64)
    draws = _mix_torch(rows[:, None] + index * _signed(_GOLDEN))
    return _shift(draws, 40).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Noise:
    """The draws of drop path and dropout in one pass of one step, for the rows at `positions` (int64 `[B]`)."""

    seed: int
    step: int
    name: str  # of the pass: two passes over the same rows draw independently
    positions: torch.Tensor

    def uniform(self, purpose: str, n: int) -> torch.Tensor:
        """Float32 `[B, n]` in [0, 1); a row's draws do not depend on the other rows of the batch."""
        return uniforms_torch(stream(self.seed, f"{self.name}/{purpose}", self.step), self.positions, n)


@dataclass(frozen=True)
class Noises:
    """The draws of several passes that run as one, their rows one after the other."""

    parts: tuple[Noise, ...]

    @classmethod
    def of(cls, parts: Iterable[Noise | None]) -> Noises | None:
        """None if nothing is drawn."""
        drawn = tuple(part for part in parts if part is not None)
        return cls(drawn) if drawn else None

    def uniform(self, purpose: str, n: int) -> torch.Tensor:
        import torch

        return torch.cat([part.uniform(purpose, n) for part in self.parts])
