"""`prepare`: a data set from any public format, or an index of shards that exist."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, get_args, get_type_hints

import pyarrow as pa

from vlmo_ray.data.manifest import MANIFEST, Chunk, Format, check_forbid, chunk_table, write_manifest
from vlmo_ray.data.prepare import shuffle
from vlmo_ray.data.prepare.scores import Scored
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.prepare.source import Shards, Source, WorkUnit
from vlmo_ray.data.prepare.stage import WORK, results, run_stage
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.session import ray_session

__all__ = ["FORMATS", "Counts", "prepare", "write_dataset"]

_EXAMPLES = {"true or false": "false", "a number": "9"}  # of options, by what they are; others: "'name'"
STATE, DROPPED = "prepare.json", "dropped.jsonl"


@dataclass
class Counts:
    """What became of the records of the source: `read == kept + sum(dropped.values())`."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason

    def __str__(self) -> str:
        lines = [f"{self.read:,} records read, {self.kept:,} kept, {self.read - self.kept:,} dropped"]
        return "\n".join(lines + [f"  {n:,}: {reason}" for reason, n in sorted(self.dropped.items())])


def _formats() -> dict[str, type[Source]]:
    """The classes of this package that have a `format`, so that a new module is found without being named here."""
    found = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, type) and value.__module__ == module.name and hasattr(value, "format"):
                assert value.format not in found, (name, value.format)
                found[value.format] = value
    return found


FORMATS = _formats()


def prepare(
    format: str,
    source: str,
    out: str | None = None,
    *,
    index: bool = False,
    seed: int = 0,
    memory: int = 1 << 30,
    shard_bytes: int = 256 << 20,
    rows_per_group: int = 256,
    verify: bool = False,
    forbid: tuple[str, ...] = (),
    scores: str = "",
    keep_above: float | None = None,
    **options,
) -> Counts:
    """Turn `source`, in one of `FORMATS`, into shuffled shards and a manifest at `out`; returns what was kept.

    `index=True` (webdataset, parquet) rewrites nothing: it adds a manifest beside the shards of `source`, in their
    order. Records are not shuffled and ids are not compared; training still shuffles.

    `memory` is how many bytes of records one task may hold, besides some 200 MB for the process. `verify` decodes every
    image completely instead of reading its header. `forbid` lists augmentations that would make records untrue.
    `scores` is a Parquet file with id and score: records below `keep_above`, or without a score, are dropped.
    `options` are those of the format's class. A call that was stopped continues when it is repeated; one that has
    finished returns its counts again. Dropped records are listed in `OUT/dropped.jsonl`. Two calls must not run at the
    same time with one `out`. Raises UserError for mistakes of the user.
    """
    check_forbid(tuple(forbid))
    opened = _open_source(format, source, options)
    if rows_per_group < 1 or memory < 1 << 20 or shard_bytes < 1:
        raise UserError("rows_per_group and shard_bytes must be at least 1, memory at least 1 MiB (1048576)")
    place = _place(opened, out, index)
    if bool(scores) != (keep_above is not None):
        raise UserError(f"scores={scores!r} and keep_above={keep_above} go together: give both, or neither")
    if scores and index:
        raise UserError("index=True rewrites nothing, so it can leave nothing out; leave out `scores` or `index`")
    whole = opened
    if scores and keep_above is not None:
        opened = Scored(opened, scores, keep_above)
    units = opened.units()
    # includes the units, because an unfinished run has markers of its own units
    listing = repr((opened.listing, [(unit.name, unit.bytes) for unit in units]))
    state = {
        "version": 3,  # of the files in the work folder: a newer program must not continue with older ones
        "format": format,
        "source": opened.uri,
        "listing": hashlib.sha256(listing.encode()).hexdigest(),
        "versions": hashlib.sha256(opened.versions.encode()).hexdigest(),
        "index": index,
        "rows_per_group": rows_per_group,
        "forbid": sorted(forbid),
        "schema": opened.schema.to_json(),
        "options": {name: str(getattr(whole, name)) for name in options},
    }
    if not index:
        state |= {"seed": seed, "memory": memory, "shard_bytes": shard_bytes, "verify": verify}
    finished = _begin(place, state, index)
    if finished is None:
        with ray_session():
            if index:
                assert isinstance(opened, Shards), "`_place` has refused other sources"
                finished = _index(opened, place, units, rows_per_group, memory, forbid)
            else:
                # three times, for what the Parquet writer holds and because sizes are estimates
                buckets = max(1, -(-3 * sum(unit.bytes for unit in units) // memory))
                spec = shuffle.Shuffle(opened, place, seed, buckets, memory, shard_bytes, rows_per_group, verify)
                finished = _shuffle(spec, units, forbid)
        place.write(STATE, json.dumps(state | {"counts": asdict(finished)}, indent=1).encode())
    place.delete_folder(WORK)
    return finished


def _open_source(format: str, uri: str, options: dict) -> Source:
    if format not in FORMATS:
        raise UserError(f"{format!r} is not a format; choose from {', '.join(sorted(FORMATS))}")
    known = list(inspect.signature(FORMATS[format]).parameters)[1:]
    for name in options:
        if name not in known:
            raise UserError(f"{name!r} is not an option of {format}; it has {', '.join(known) or 'none'}")
    types = get_type_hints(FORMATS[format])
    return FORMATS[format](uri, **{name: _typed(name, value, types[name]) for name, value in options.items()})


def _typed(name: str, value: Any, type_: Any) -> Any:
    """An option as the type that the format's class declares; text, as from the command line, is converted."""
    types = set(get_args(type_) or (type_,))
    if bool in types and isinstance(value, str):
        word = value.lower()
        value = word in ("true", "yes", "1") if word in ("true", "yes", "1", "false", "no", "0") else value
    if int in types and str not in types and isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if type(value) not in types:
        number = "a text or a number" if str in types else "a number"
        wanted = "true or false" if bool in types else number if int in types else "a text"
        raise UserError(
            f"{name}={value!r} is not {wanted}; write for example {name}={_EXAMPLES.get(wanted, repr('name'))}"
        )
    return value


def _place(source: Source, out: str | None, index: bool) -> Store:
    """Where to write, after checks of that place."""
    if index:
        if not isinstance(source, Shards):
            can = " and ".join(sorted(name for name, kind in FORMATS.items() if issubclass(kind, Shards)))
            raise UserError(f"only {can} sources can be indexed; leave out `index`")
        if out is not None and Store(out).uri != source.store.uri:
            raise UserError(f"index=True writes beside the shards, in {source.store.uri}; leave out {out!r}")
        return source.store
    if out is None:
        raise UserError("say where to write the data set (only index=True writes beside the source)")
    place, store = Store(out), getattr(source, "store", None)
    if store is not None and f"{place.uri}/".startswith(f"{store.uri}/"):
        raise UserError(f"{place.uri} is inside the source {store.uri}; write to another place")
    return open_store(out, create=True)


def _begin(out: Store, state: dict, index: bool) -> Counts | None:
    """Claim `out` for this preparation; returns the counts if it is already finished.

    With `index`, `out` is the user's source: no message may advise to delete it.
    """
    state = json.loads(json.dumps(state))
    again = f"delete {STATE} and {MANIFEST} there" if index else "delete it, or choose another place"
    try:
        found = out.read(STATE)
    except FileNotFoundError:
        if in_the_way := [n for n in out.list() if n == MANIFEST or n.startswith(f"{WORK}/") or not index]:
            raise UserError(
                f"{out.address(in_the_way[0])} is in the way, and was not made by this command; "
                + ("move it" if index else "write to an empty place")
            ) from None
        out.write(STATE, json.dumps(state, indent=1).encode())
        return None
    try:
        # what older ones do not state
        before: dict[str, Any] = {"schema": PAIRS.to_json(), "versions": state["versions"]} | dict(json.loads(found))
        counts: dict[str, Any] | None = before.pop("counts", None)
        if counts is not None:  # finished, so the work folder has no files
            before["version"] = state["version"]
    except (ValueError, TypeError) as error:
        raise UserError(f"{out.uri} has a {STATE} that cannot be read; {again}") from error
    if before != state:
        changes = {key: f"{key} was {before.get(key)!r}, is now {state.get(key)!r}" for key in state | before}
        changes["listing"] = changes["versions"] = "the source has changed"
        different = dict.fromkeys(change for key, change in changes.items() if before.get(key) != state.get(key))
        raise UserError(f"{out.uri} holds another preparation ({'; '.join(different)}); {again}")
    return Counts(**counts) if counts is not None and out.exists(MANIFEST) else None


def _shuffle(spec: shuffle.Shuffle, units: list[WorkUnit], forbid: Iterable[str]) -> Counts:
    numbered, work = list(enumerate(units)), functools.partial(shuffle.scatter, spec)
    run_stage(spec.out, "scatter", numbered, work, spec.memory, "pass 1 of 2, MB read", _megabytes(units))
    pieces, chunks, num_read, dropped = [], [], 0, shuffle.Dropped()
    for result in results(spec.out, "scatter", len(units)):
        pieces.append(result["pieces"])
        num_read += result["read"]
        dropped.merge(result)
    buckets = list(range(spec.num_buckets))
    work = functools.partial(shuffle.gather, spec, pieces)
    run_stage(spec.out, "gather", buckets, work, spec.memory, "pass 2 of 2, parts written", [1] * len(buckets))
    for result in results(spec.out, "gather", len(buckets)):
        chunks.append(_table("parquet", result["chunks"]))
        dropped.merge(result)
    num_dropped = dropped.counts.total()
    counts = Counts(num_read, num_read - num_dropped, dict(sorted(dropped.counts.items())))
    lines = [json.dumps(entry) for entry in dropped.listed]
    if num_dropped > len(lines):
        lines.append(json.dumps({"note": f"{num_dropped - len(lines)} more were dropped and are not listed"}))
    spec.out.write(DROPPED, "".join(f"{line}\n" for line in lines).encode())
    if not counts.kept:
        raise UserError(f"no record of {spec.source.uri} is left:\n{counts}\nsee {spec.out.address(DROPPED)}")
    facts = {"forbid": tuple(forbid), "source": spec.source.uri, "schema": spec.source.schema}
    manifest = write_manifest(spec.out.uri, "parquet", pa.concat_tables(chunks), **facts)
    assert manifest.num_rows == counts.kept, (manifest.num_rows, counts)
    return counts


def _index(
    source: Shards, out: Store, units: list[WorkUnit], rows_per_chunk: int, memory: int, forbid: Iterable[str]
) -> Counts:
    if compressed := [unit.name for unit in units if unit.name.lower().endswith(("gz", "bz2"))]:
        raise UserError(
            f"{out.address(compressed[0])} is compressed, so a chunk of it cannot be read alone; "
            "unpack it, or rewrite the data set by leaving out `index`"
        )
    run_stage(
        out,
        "index",
        units,
        lambda unit: {"chunks": shuffle.packed(source.chunks(unit, rows_per_chunk))},
        memory,
        "indexing, MB read",
        _megabytes(units),
    )
    format: Format = "parquet" if source.format == "parquet" else "webdataset"
    chunks = pa.concat_tables(_table(format, result["chunks"]) for result in results(out, "index", len(units)))
    manifest = write_manifest(out.uri, format, chunks, forbid=tuple(forbid), source=out.uri, schema=source.schema)
    return Counts(manifest.num_rows, manifest.num_rows)


def _megabytes(units: list[WorkUnit]) -> list[float]:
    return [unit.bytes / 1e6 for unit in units]


def _table(format: Format, packed: list[list]) -> pa.Table:
    """The chunks that a task has returned."""
    return chunk_table([Chunk(format, *fields) for fields in packed])
