"""Which pairs the committed steps of a run consumed, and whether that was every pair once an epoch.

Each worker records the ids that it found in the decoded records: one Parquet file per checkpoint, under
`audit/<attempt>/`. An attempt is one start of the run. The newest checkpoint states from which step on each attempt
counts, so steps that a lost attempt did after its last checkpoint are not counted.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import Manifest, load_manifest
from vlmo_ray.data.order import Schedule
from vlmo_ray.data.reader import chunk_ids
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import from_dict
from vlmo_ray.runs.checkpoints import Checkpoints

_FOLDER = "audit"


@dataclass
class Consumed:
    """The pairs that one worker has consumed since its last checkpoint."""

    attempt: str
    _steps: list[tuple[int, np.ndarray, list[str], np.ndarray]] = field(default_factory=list)

    def add(self, step: int, batch: Batch) -> None:
        self._steps.append((step, batch.position.numpy(force=True), batch.ids, batch.valid.numpy(force=True)))

    def take(self) -> dict[str, bytes]:
        """Everything added since the last call, as files of the run: name -> content."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        rows = {
            "step": pa.array(np.concatenate([np.full(len(p), step, np.int32) for step, p, _, _ in steps])),
            "position": pa.array(np.concatenate([p.astype(np.int32) for _, p, _, _ in steps])),
            "id": pa.array([name for _, _, ids, _ in steps for name in ids]),
            "valid": pa.array(np.concatenate([valid for _, _, _, valid in steps])),
        }
        out = io.BytesIO()
        pq.write_table(pa.table(rows), out, compression="zstd")
        first = int(steps[0][1][0])
        return {f"{_FOLDER}/{self.attempt}/{steps[0][0]:08d}-{first:08d}.parquet": out.getvalue()}


@dataclass(frozen=True)
class EpochAudit:
    """What the committed steps consumed of one epoch."""

    epoch: int
    rows: int  # that the committed steps should have consumed
    seen: int  # that were recorded
    masked: tuple[str, ...]  # seen rows that were unreadable: ids, or addresses if no id could be read
    complete: bool  # the committed steps cover the whole epoch
    missing: tuple[str, ...]  # ids of the data set that were not seen; only of a complete epoch
    doubled: tuple[str, ...]  # ids that were seen more often than the data set has them
    unknown: tuple[str, ...]  # ids that the data set does not have

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
                    said.append(f"epoch {epoch.epoch}, {what}: {', '.join(ids[:10])}{rest}")
        verdict = "NOT every pair was consumed once"
        if self.clean:
            masked = sum(len(epoch.masked) for epoch in self.epochs)
            but = f", {masked:,} of them masked" if masked else ""
            verdict = f"every pair was consumed once an epoch{but}"
        return [*said, f"{self.steps} committed steps: {verdict}"]


def table(found: Audit) -> Table:
    """A row for each epoch."""
    out = Table("epoch", "rows", "seen", "masked", "missing", "doubled", "unknown")
    for e in found.epochs:
        numbers = (e.rows, e.seen, len(e.masked), len(e.missing), len(e.doubled), len(e.unknown))
        out.add_row(f"{e.epoch}{'' if e.complete else ' (so far)'}", *(f"{n:,}" for n in numbers))
    return out


def audit(run: str, data: str) -> Audit:
    """Compares what a run recorded (`audit=true`) with its data set.

    In a damaged chunk the run records addresses in place of ids; they match even if the chunk was repaired since. If a
    chunk was damaged after it was read, its ids are reported as unknown and its addresses as missing.
    Raises UserError if there is nothing to audit, or if the run was trained on another data set.
    """
    store = open_store(run)
    state = Checkpoints(store).newest()
    if state is None:
        raise UserError(f"{run} has no checkpoint: there are no committed steps to audit")
    config, manifest = from_dict(state.config), load_manifest(data)
    if not config.audit:
        raise UserError(f"{run} kept no record of its pairs; train with --set audit=true")
    if manifest.fingerprint != state.fingerprint:
        raise UserError(f"{data} is not the data set that {run} was trained on; name that one")
    schedule = Schedule(tuple((p.steps, p.global_batch) for p in config.phases), config.slice_size)
    consumed = _committed(store, state.attempts, state.step)
    step = consumed.column("step").to_numpy().astype(np.int64)
    stream = schedule.rows_before(step) + consumed.column("position").to_numpy()
    total = int(schedule.rows_before(state.step))
    known = _ids_of(manifest)
    ids = np.array([known.get(name, name) for name in consumed.column("id").to_pylist()], dtype=object)
    valid = consumed.column("valid").to_numpy(False)

    counts = np.bincount(stream, minlength=total)
    problems = []
    for what, wrong in (("not consumed", counts == 0), ("consumed more than once", counts > 1)):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            at = int(np.searchsorted(schedule.rows_before(np.arange(state.step + 1)), first, side="right")) - 1
            problems.append(f"{int(wrong.sum())} positions {what}, the first in step {at}")
    in_data = Counter(known.values())
    epochs = []
    for epoch in range(-(-total // manifest.num_rows)):
        here = stream // manifest.num_rows == epoch
        rows = min(total - epoch * manifest.num_rows, manifest.num_rows)
        seen = Counter(ids[here])
        complete = rows == manifest.num_rows
        epochs.append(
            EpochAudit(
                epoch=epoch,
                rows=rows,
                seen=int(here.sum()),
                masked=tuple(ids[here & ~valid]),
                complete=complete,
                missing=tuple((in_data - seen).elements()) if complete else (),
                doubled=tuple(name for name in (seen - in_data).elements() if name in in_data),
                unknown=tuple(name for name in seen if name not in in_data),
            )
        )
    return Audit(state.step, tuple(problems), tuple(epochs))


def _committed(store: Store, attempts: list[tuple[int, str]], stop: int) -> pa.Table:
    """The rows of every attempt from its first step up to the first step of the next attempt."""
    files: dict[str, list[str]] = {}
    for name in store.list(f"{_FOLDER}/"):
        files.setdefault(PurePosixPath(name).parent.name, []).append(name)
    pieces = []
    ends = [first for first, _ in attempts[1:]] + [stop]
    for (first, attempt), end in zip(attempts, ends, strict=True):
        for name in files.get(attempt, []):
            table = pq.read_table(io.BytesIO(store.read(name)))
            step = table.column("step").to_numpy()
            pieces.append(table.filter(pa.array((step >= first) & (step < end))))
    if not pieces:
        raise UserError(f"{store.uri} has no record of its pairs under {_FOLDER}/")
    return pa.concat_tables(pieces)


def _ids_of(manifest: Manifest) -> dict[str, str]:
    """Address -> id of every row."""
    chunks = (chunk_ids(manifest, index) for index in range(manifest.num_chunks))
    return {address: name for chunk in chunks for address, name in chunk.items()}
