"""Whether the committed steps of a run consumed every pair of its data set once an epoch.

The memory grows neither with the data set nor with the run: ids and positions are compared as `multisets`, bucket by
bucket. Only what is in buckets that differ is read again, to be named.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.table import Table

from vlmo_ray.data.mix import Mix, load_data
from vlmo_ray.data.order import Order, Schedule
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import from_dict
from vlmo_ray.progress import tracked
from vlmo_ray.rng import mix
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.consumed import DataIds, Log, Recorded, Stored
from vlmo_ray.runs.multisets import Multisets, keys_of

_BUCKET_ROWS, _MOST_BUCKETS = 512, 1 << 20
_NAMED = 1 << 18  # about how many ids of an epoch are looked at one by one


@dataclass(frozen=True)
class EpochAudit:
    """What the committed steps consumed of one epoch."""

    epoch: int
    rows: int  # that the committed steps should have consumed
    seen: int  # that were recorded
    masked: tuple[str, ...]  # seen rows that were unreadable: ids, or addresses if no id could be read then
    complete: bool  # the committed steps cover the whole epoch
    missing: tuple[str, ...]  # ids that should have been seen by now, and were not
    doubled: tuple[str, ...]  # ids that were seen more often than the data set has them
    unknown: tuple[str, ...]  # ids that the data set does not have
    data: str = ""  # URI of the data set, where the run has several

    @property
    def clean(self) -> bool:
        return self.rows == self.seen and not (self.missing or self.doubled or self.unknown)


@dataclass(frozen=True)
class Audit:
    """What the first `steps` steps of a run consumed."""

    steps: int
    problems: tuple[str, ...]  # sentences about stream positions that were not consumed exactly once
    epochs: tuple[EpochAudit, ...]

    @property
    def clean(self) -> bool:
        return not self.problems and all(epoch.clean for epoch in self.epochs)

    def sentences(self) -> list[str]:
        """What the table does not show; the last sentence is the verdict."""
        said = list(self.problems)
        for epoch in self.epochs:
            for what in ("masked", "missing", "doubled", "unknown"):
                if ids := getattr(epoch, what):
                    rest = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
                    where = f" of {epoch.data}" if epoch.data else ""
                    said.append(f"epoch {epoch.epoch}{where}, {what}: {', '.join(ids[:10])}{rest}")
        verdict = "NOT every pair was consumed once"
        if self.clean:
            masked = sum(len(epoch.masked) for epoch in self.epochs)
            but = f", {masked:,} of them masked" if masked else ""
            verdict = f"every pair was consumed once an epoch{but}"
        return [*said, f"{self.steps} committed steps: {verdict}"]


def table(found: Audit) -> Table:
    """A row for each epoch of each data set."""
    several = any(epoch.data for epoch in found.epochs)
    out = Table(*["data"] * several, "epoch", "rows", "seen", "masked", "missing", "doubled", "unknown")
    for e in found.epochs:
        numbers = (e.rows, e.seen, len(e.masked), len(e.missing), len(e.doubled), len(e.unknown))
        epoch = f"{e.epoch}{'' if e.complete else ' (so far)'}"
        out.add_row(*[e.data] * several, epoch, *(f"{n:,}" for n in numbers))
    return out


def audit(run: str, data: str) -> Audit:
    """Compares what a run recorded (`audit=true`) with the ids of its data set.

    In a damaged chunk the run records addresses in place of ids; they match even if the chunk was repaired since. If
    ids became unreadable after they were read, they are reported as unknown and their addresses as missing.
    Raises UserError if there is nothing to audit, or if the run was trained on another data set.
    """
    store = open_store(run)
    state = Checkpoints(store).newest()
    if state is None:
        raise UserError(f"{run} has no checkpoint: there are no committed steps to audit")
    config = from_dict(state.config)
    sources = load_data(data, config.data.weights)
    if not config.audit:
        raise UserError(f"{run} kept no record of its pairs; train with --set audit=true")
    if sources.fingerprint != state.fingerprint:
        raise UserError(f"{data} is not the data set that {run} was trained on; name that one")
    schedule = Schedule(tuple((p.steps, p.global_batch) for p in config.phases), config.slice_size)
    order, log = sources.order(config.seed, schedule, config.data.shuffle_steps), Log(store, state.attempts, state.step)
    if isinstance(order, Order):
        return _Comparison(log, DataIds(sources.manifests[0], order, state.step)).run()
    problems, epochs = [], []
    for k, manifest in enumerate(sources.manifests):
        found = _Comparison(_Part(log, order, k), DataIds(manifest, order.orders[k], state.step)).run()
        problems += [f"{manifest.uri}: {problem}" for problem in found.problems]
        epochs += [dataclasses.replace(epoch, data=manifest.uri) for epoch in found.epochs]
    return Audit(state.step, tuple(problems), tuple(epochs))


class _Part:
    """What the log says of one of several data sets, with positions among the rows of that one."""

    def __init__(self, log: Log, mix: Mix, source: int):
        self._log, self._mix, self._source, self.stop = log, mix, source, log.stop

    def read(self) -> Iterator[Recorded]:
        before = self._mix.schedule.rows_before(np.arange(self.stop + 1))
        for rows in self._log.read():
            own, sizes = np.full(len(rows.step), -1), np.diff(before)[rows.step]
            for size in np.unique(sizes):
                here = sizes == size
                own[here] = self._mix.own_position(self._source, rows.position[here], int(size))
            kept = np.flatnonzero(own >= 0)
            names = rows.names.take(pa.array(kept))
            yield Recorded(rows.step[kept], own[kept], rows.valid[kept], names, rows.keys[kept])


class _Comparison:
    """The log of a run beside the ids of its data set; E epochs, S committed steps."""

    def __init__(self, log: Log | _Part, ids: DataIds):
        self.log, self.ids = log, ids
        self.num_rows = ids.manifest.num_rows
        self.before = ids.order.schedule.rows_before(np.arange(log.stop + 1))  # rows before each step, int64 [S + 1]
        total = int(self.before[-1])
        self.num_epochs = -(-total // self.num_rows)
        self.rows = np.minimum(total - np.arange(self.num_epochs) * self.num_rows, self.num_rows)  # of each epoch
        self.buckets = min(_MOST_BUCKETS, 1 << (self.num_rows // _BUCKET_ROWS).bit_length())
        self.seen = np.zeros(self.num_epochs, np.int64)
        self.masked: list[list[str]] = [[] for _ in range(self.num_epochs)]  # as they were recorded
        self.known: dict[str, str] = {}  # address of a masked row -> the name that the data set has for it

    def run(self) -> Audit:
        """Reads everything once, and again if something differs."""
        steps, ids = self._recorded()
        wanted = Multisets(2, self.buckets)  # of a complete epoch, and of the newest one
        for rows in self._stored({name for names in self.masked for name in names}):
            wanted.add(0, self._bucket(rows.keys), rows.keys)
            wanted.add(1, self._bucket(rows.keys[rows.due]), rows.keys[rows.due])
            self.known |= rows.ids
        for epoch in range(self.num_epochs):
            keys = keys_of(pa.array(self._known(epoch), pa.string()))
            ids.add(epoch, self._bucket(keys), keys)
        bad = np.stack([ids.differ(e, wanted, int(self.rows[e] < self.num_rows)) for e in range(self.num_epochs)])
        problems, most = self._problems(steps), max(1, _NAMED * self.buckets // self.num_rows)
        for epoch, differing in enumerate(map(np.flatnonzero, bad)):
            if len(differing) > most:
                bad[epoch, differing[most:]] = False
                problems.append(f"epoch {epoch}: of the ids that differ, only {most / len(differing):.2%} are named")
        return self._named(bad, problems)

    def _logged(self) -> Iterator[Recorded]:
        total = int(self.before[-1])
        return tracked(self.log.read(), "reading the run's record", total, lambda rows: len(rows.step))

    def _stored(self, addresses: AbstractSet[str] = frozenset()) -> Iterator[Stored]:
        found = self.ids.read(addresses)
        return tracked(found, "reading the data's ids", self.num_rows, lambda rows: len(rows.keys))

    def _recorded(self) -> tuple[Multisets, Multisets]:
        """The positions of every step (one multiset, S buckets), and the valid ids of every epoch (E multisets)."""
        steps, ids = Multisets(1, self.log.stop), Multisets(self.num_epochs, self.buckets)
        for rows in self._logged():
            steps.add(0, rows.step, mix(rows.position.astype(np.uint64)))
            epoch = self._epoch(rows.step, rows.position)
            self.seen += np.bincount(epoch, minlength=self.num_epochs)
            keys = rows.keys[rows.valid]
            ids.add(epoch[rows.valid], self._bucket(keys), keys)
            for i in np.flatnonzero(~rows.valid).tolist():
                self.masked[epoch[i]].append(rows.names[i].as_py())
        return steps, ids

    def _problems(self, steps: Multisets) -> list[str]:
        """What is wrong with the positions that the steps consumed."""
        sizes = np.diff(self.before)
        gaps, sums = sizes - steps.counts[0], np.zeros(len(sizes), np.uint64)
        for size in np.unique(sizes):
            sums[sizes == size] = mix(np.arange(size, dtype=np.uint64)).sum()
        kinds = {
            "positions not consumed": np.maximum(gaps, 0),
            "positions consumed more than once": np.maximum(-gaps, 0),
            "steps consumed some positions in place of others": (gaps == 0) & (sums != steps.sums[0]),
        }
        found = {what: count for what, count in kinds.items() if count.any()}
        return [f"{count.sum()} {what}, the first in step {np.argmax(count > 0)}" for what, count in found.items()]

    def _epoch(self, step: np.ndarray, position: np.ndarray) -> np.ndarray:
        return np.minimum((self.before[step] + position) // self.num_rows, self.num_epochs - 1)

    def _bucket(self, keys: np.ndarray) -> np.ndarray:
        return (keys & np.uint64(self.buckets - 1)).astype(np.int64)

    def _known(self, epoch: int) -> list[str]:
        return [self.known.get(name, name) for name in self.masked[epoch]]

    def _named(self, bad: np.ndarray, problems: list[str]) -> Audit:
        """The result, after a look at each id in the buckets `bad`, bool [E, buckets]."""
        seen = [Counter[str]() for _ in range(self.num_epochs)]
        wanted, due = ([Counter[str]() for _ in range(self.num_epochs)] for _ in range(2))
        if bad.any():
            for rows in self._logged():
                epoch = self._epoch(rows.step, rows.position)
                for i in np.flatnonzero(rows.valid & bad[epoch, self._bucket(rows.keys)]).tolist():
                    seen[epoch[i]][rows.names[i].as_py()] += 1
            for rows in self._stored():
                found = bad[:, self._bucket(rows.keys)]
                for epoch, i in zip(*map(np.ndarray.tolist, np.nonzero(found)), strict=True):
                    name = rows.names[i].as_py()
                    wanted[epoch][name] += 1
                    due[epoch][name] += int(rows.due[i] or self.rows[epoch] == self.num_rows)
            for epoch in range(self.num_epochs):
                names = self._known(epoch)
                buckets = self._bucket(keys_of(pa.array(names, pa.string())))
                seen[epoch].update(name for name, here in zip(names, bad[epoch, buckets], strict=True) if here)
        epochs = [
            EpochAudit(
                epoch=e,
                rows=int(self.rows[e]),
                seen=int(self.seen[e]),
                masked=tuple(self.masked[e]),
                complete=bool(self.rows[e] == self.num_rows),
                missing=tuple((due[e] - seen[e]).elements()),
                doubled=tuple(name for name in (seen[e] - wanted[e]).elements() if name in wanted[e]),
                unknown=tuple(name for name in seen[e] if name not in wanted[e]),
            )
            for e in range(self.num_epochs)
        ]
        return Audit(self.log.stop, tuple(problems), tuple(epochs))
