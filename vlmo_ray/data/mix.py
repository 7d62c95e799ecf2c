"""Several data sets in one run: a fixed number of slices of every batch comes from each.

Each data set has an `Order` of its own, over the schedule of its own slices. So a run sees each exactly once per epoch
of that data set, however long the others are, and its place in each follows from the step alone.

    weights 2 and 1, batches of 6 slices: 4 slices of A and 2 of B, spread evenly: A B A A B A
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmo_ray.data.manifest import Manifest, load_manifest
from vlmo_ray.data.order import Order, Rows, Schedule
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError


@dataclass(frozen=True, eq=False)
class DataSets:
    """What a run trains on: one data set or several, of equal columns."""

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]  # of the slices of a batch

    @property
    def schema(self) -> Schema:
        return self.manifests[0].schema

    @property
    def num_rows(self) -> int:
        return sum(manifest.num_rows for manifest in self.manifests)

    @property
    def fingerprint(self) -> str:
        """That of the data set; of several, of them all and their weights."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        facts = [[manifest.fingerprint for manifest in self.manifests], list(self.weights)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def order(self, seed: int, schedule: Schedule, shuffle_steps: int) -> Order | Mix:
        if len(self.manifests) == 1:
            return Order(self.manifests[0].chunk_rows, seed, schedule, shuffle_steps)
        return Mix([m.chunk_rows for m in self.manifests], self.weights, seed, schedule, shuffle_steps)


def addresses(data: str) -> list[str]:
    """The data sets that `--data` names, separated by commas. Raises UserError if a name is missing or there twice."""
    found = [address.strip() for address in data.split(",")]
    if not all(found):
        raise UserError(f"data={data!r} lacks a name beside a comma; write --data A or --data A,B")
    if twice := [address for address in found if found.count(address) > 1]:
        raise UserError(f"data={data!r} names {twice[0]} twice; name it once, and say by data.weights how much of it")
    return found


def load_data(data: str, weights: Sequence[float] = (), retry_timeout_s: float | None = None) -> DataSets:
    """The data sets at `data`; without `weights` each has as many slices of a batch as rows, so all epochs are alike.

    Raises UserError if one cannot be read, if their columns differ, or if the weights are not one each.
    """
    manifests = tuple(load_manifest(address, retry_timeout_s) for address in addresses(data))
    if weights and len(weights) != len(manifests):
        raise UserError(f"data.weights has {len(weights)} weights for {len(manifests)} data sets; give one each")
    for manifest in manifests[1:]:
        if manifest.schema != manifests[0].schema:
            raise UserError(
                f"{manifest.uri} has other columns than {manifests[0].uri}: {', '.join(manifest.schema.names)} and "
                f"{', '.join(manifests[0].schema.names)}, or other values in them; prepare them alike"
            )
    return DataSets(manifests, tuple(weights) or tuple(float(manifest.num_rows) for manifest in manifests))


def shares(num_slices: int, weights: Sequence[float]) -> list[int]:
    """How many of `num_slices` slices each data set gets: by largest remainder, at least one each."""
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"the weights {list(weights)} must all be above 0 and finite; leave a data set out instead")
    if len(weights) > num_slices:
        raise UserError(
            f"{len(weights)} data sets do not fit into the {num_slices} slices of a batch; lower slice_size"
        )
    exact = np.asarray(weights, float) / sum(weights) * num_slices
    out = np.maximum(np.floor(exact), 1).astype(int)
    while out.sum() != num_slices:
        missing = np.sign(num_slices - out.sum())
        allowed = np.where((out > 1) | (missing > 0), missing * (exact - out), -np.inf)
        out[int(np.argmax(allowed))] += missing
    return out.tolist()


def pattern(counts: Sequence[int]) -> np.ndarray:
    """The data set of each slice of a batch, int `[sum(counts)]`: the slices of each are evenly spread."""
    source = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return source[np.lexsort((source, place))]


class Mix:
    """The rows of every batch of several data sets, with the methods of `Order`; chunks are numbered as in `Sources`.

    Args:
        chunk_rows: of each data set the rows of its chunks, int `[C]`.
        weights: of each data set, the share of a batch that it gets, up to whole slices.
        seed, schedule, shuffle_steps: as for `Order`.
    """

    def __init__(
        self,
        chunk_rows: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        schedule: Schedule,
        shuffle_steps: int,
    ):
        if len(weights) != len(chunk_rows):
            raise UserError(f"{len(chunk_rows)} data sets have {len(weights)} weights; give one each")
        self.schedule = schedule
        size = schedule.slice_size
        counts = [shares(batch // size, weights) for _, batch in schedule.phases]
        self._patterns = {sum(count): pattern(count) for count in counts}
        self._first_chunk = np.cumsum([0, *map(len, chunk_rows)])
        self.orders = []
        for k, rows in enumerate(chunk_rows):
            phases = zip(schedule.phases, counts, strict=True)
            own = Schedule(tuple((steps, count[k] * size) for (steps, _), count in phases), size)
            self.orders.append(Order(rows, seed, own, shuffle_steps))

    @cached_property
    def num_rows(self) -> int:
        return sum(order.num_rows for order in self.orders)

    def own_position(self, source: int, position: np.ndarray, batch: int) -> np.ndarray:
        """The positions in a batch of `batch` rows as positions among the rows of one data set; -1 for other rows."""
        size = self.schedule.slice_size
        own = self._patterns[batch // size] == source
        numbers = np.where(own, np.cumsum(own) - 1, -1)[position // size]
        return np.where(numbers < 0, -1, numbers * size + position % size)

    def span(self, step: int) -> range:
        """The steps whose rows are shuffled together with those of `step`: the same in every data set."""
        return self.orders[0].span(step)

    def slice_rows(
        self, span: range, first_slice: int, last_slice: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """The rows of slices `[first_slice, last_slice)` in the steps of `span` that are in `[start, stop)`."""
        source = self._patterns[self.schedule.num_slices(span.start)]
        size = self.schedule.slice_size
        pieces = []
        for k, order in enumerate(self.orders):
            slices = np.flatnonzero(source == k)  # where its own slices are in the batch
            first, last = np.searchsorted(slices, [first_slice, last_slice])
            rows = order.slice_rows(span, int(first), int(last), start, stop)
            position = slices[rows.position // size] * size + rows.position % size
            pieces.append(Rows(rows.step, position, rows.epoch, rows.chunk + self._first_chunk[k], rows.row))
        together = Rows.concatenate(pieces)
        return together.take(np.lexsort((together.position, together.step)))
