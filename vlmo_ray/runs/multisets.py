"""Compares large multisets of strings in little memory: by a count and a sum of hashes for each of many buckets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vlmo_ray.rng import mix

_BASE = 0x9E3779B97F4A7C15  # odd
_BLOCK = 1 << 14  # strings that are hashed at once: what is in the making stays in the cache


def keys_of(names: pa.Array) -> np.ndarray:
    """A 64-bit hash of each string, uint64 `[n]`: a polynomial of its bytes, mixed. It withstands no attacker."""
    whole = names.cast(pa.large_string())
    parts = [_keys_of(whole.slice(start, _BLOCK)) for start in range(0, len(whole), _BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _keys_of(names: pa.LargeStringArray) -> np.ndarray:
    _, places, content = names.buffers()
    offsets = np.frombuffer(places, np.int64)[names.offset : names.offset + len(names) + 1]
    data = np.frombuffer(content or b"", np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    powers = np.full(int(lengths.max(initial=0)) + 1, _BASE, np.uint64)
    np.multiply.accumulate(powers, out=powers)
    # the weight of a byte is a power of its place in the string
    data *= powers[np.arange(len(data)) - np.repeat(starts, lengths)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(data)])  # modulo 2^64
    return mix(sums[starts + lengths] - sums[starts] + lengths.astype(np.uint64))


class Multisets:
    """`sets` multisets of hashes in `buckets` buckets each. For every bucket only two numbers are kept.

    Buckets with equal contents agree in both. Others differ, but for a chance of 2^-64 each.
    """

    def __init__(self, sets: int, buckets: int):
        self.counts = np.zeros((sets, buckets), np.int64)
        self.sums = np.zeros((sets, buckets), np.uint64)  # of the hashes, modulo 2^64

    def add(self, which: np.ndarray | int, bucket: np.ndarray, keys: np.ndarray) -> None:
        """Adds `keys` (uint64 `[n]`) to the buckets `bucket` of the multisets `which`."""
        flat = which * self.counts.shape[1] + bucket
        np.add.at(self.counts.reshape(-1), flat, 1)
        np.add.at(self.sums.reshape(-1), flat, keys)

    def differ(self, which: int, other: Multisets, its: int) -> np.ndarray:
        """The buckets in which two multisets are not equal, bool `[buckets]`."""
        return (self.counts[which] != other.counts[its]) | (self.sums[which] != other.sums[its])
