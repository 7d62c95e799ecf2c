"""What the public formats have in common: units of work, and images from folders."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from vlmo_ray.data.manifest import MANIFEST, Chunk
from vlmo_ray.data.schema import Record, Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

UNIT_BYTES = 64 << 20  # of the records in one task, where the format lets us choose


@dataclass(frozen=True)
class WorkUnit:
    """What one task reads of the source; `bytes` estimates what its records take."""

    name: str
    bytes: int
    content: Any = None


class Source(Protocol):
    """A public format, opened. Picklable: `records` runs in other processes.

    Every class in a module of this package that has a `format` is a source that `prepare` knows by that name.
    Its first argument is the address, the others are the options of the format.
    """

    format: ClassVar[str]
    uri: str  # complete
    listing: str  # changes when the source does
    schema: Schema  # of its records

    def units(self) -> list[WorkUnit]: ...

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        """Every record of the unit, bad ones with their `problem`; UserError if the unit cannot be read."""
        ...


class Indexable(Source, Protocol):
    """A source whose files training can read as they are; `format` is one of `manifest.Format`."""

    store: Store

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]: ...


def cut_units(name: str, items: Iterable[tuple[Any, int]]) -> list[WorkUnit]:
    """Units `<name> part 0`, ... of about `UNIT_BYTES`, from items and their bytes; `content` lists the items."""
    units, content, size = [], [], 0
    for item, num_bytes in items:
        content.append(item)
        size += num_bytes
        if size >= UNIT_BYTES:
            units.append(WorkUnit(f"{name} part {len(units)}", size, content))
            content, size = [], 0
    return [*units, WorkUnit(f"{name} part {len(units)}", size, content)] if content else units


def open_file(uri: str) -> tuple[Store, str]:
    """The store and name of one file; UserError if it does not exist."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    if not store.exists(name):
        raise UserError(f"{store.address(name)} does not exist")
    return store, name


def list_shards(uri: str, suffixes: tuple[str, ...], *, what: str) -> tuple[str, Store, dict[str, int]]:
    """Full address, store, and name -> bytes of the files at `uri` that end in one of `suffixes`."""
    if uri.endswith(suffixes):
        store, name = open_file(uri)
        return store.address(name), store, {name: store.size(name)}
    store = open_store(uri)
    sizes = {n: size for n, size in store.sizes().items() if n.endswith(suffixes) and n != MANIFEST}
    if not sizes:
        raise UserError(f"{store.uri} holds no {what} ({', '.join(suffixes)})")
    return store.uri, store, sizes


def name_in(store: Store, path: str) -> str | None:
    """`path`, relative or absolute, as a name in the store; None if it leads out of it."""
    for prefix in (store.uri, store.root):
        if path.startswith(prefix.rstrip("/") + "/"):
            path = path[len(prefix.rstrip("/")) + 1 :]
            break
    name = posixpath.normpath(path)
    return None if name.startswith(("/", "..")) or name == "." or "://" in path else name


def read_images(store: Store, paths: Iterable[str | tuple[str, ...]]) -> Iterator[tuple[bytes | None, str]]:
    """Image bytes and problem of each path, in order, read several at a time; a tuple gives alternatives."""

    def read(path: str | tuple[str, ...]) -> tuple[bytes | None, str]:
        for candidate in (path,) if isinstance(path, str) else path:
            name = name_in(store, candidate)
            if any("\ud800" <= c <= "\udfff" for c in candidate):
                return None, "the image path is not UTF-8"
            if name is None:
                return None, "the image path leads out of the image folder"
            try:
                return store.read(name), ""
            except FileNotFoundError:
                continue
        return None, "the image file is missing"

    paths = iter(paths)
    with ThreadPoolExecutor(8) as pool:
        while some := list(itertools.islice(paths, 32)):  # so that few images are held at once
            yield from pool.map(read, some)


def mean_image_bytes(store: Store, paths: list[str | tuple[str, ...]], sample: int = 64) -> int:
    """The mean size of up to `sample` of the images, evenly spaced; at least 1."""
    picks = paths[:: max(1, len(paths) // sample)]

    def size(path: str | tuple[str, ...]) -> int | None:
        names = [name_in(store, p) for p in ((path,) if isinstance(path, str) else path)]
        return next((s for s in (store.size(n) for n in names if n) if s is not None), None)

    with ThreadPoolExecutor(8) as pool:
        found = [s for s in pool.map(size, picks) if s is not None]
    if not found:
        raise UserError(
            f"none of {len(picks)} images looked for is in {store.uri}, e.g. {picks[0] if picks else '-'!r}; "
            "name the image folder with images=..."
        )
    return max(1, sum(found) // len(found))
