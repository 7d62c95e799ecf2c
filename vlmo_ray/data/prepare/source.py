"""What the public formats have in common: work units, shards, columns by name, and images from folders."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmo_ray.data.manifest import MANIFEST, Chunk
from vlmo_ray.data.schema import PAIRS, Record, Schema, is_unicode
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

UNIT_BYTES = 64 << 20  # about the records of one work unit, for formats that can be cut anywhere


@dataclass(frozen=True)
class WorkUnit:
    """What one task reads of the source; `bytes` estimates what its records take."""

    name: str
    bytes: int
    content: Any = None


class Source:
    """A public format, opened. Picklable: `records` runs in other processes.

    `prepare` finds every class with a `format` in a module of this package. Options are keyword arguments.
    """

    format: ClassVar[str]
    uri: str  # complete
    listing: str  # changes when the source does
    versions: str = ""  # changes when a file of the source is written again, if `listing` does not tell
    schema: Schema = PAIRS  # of its records
    _units: list[WorkUnit]

    def __init__(self, uri: str, **options) -> None:
        raise NotImplementedError

    def units(self) -> list[WorkUnit]:
        return self._units

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        """Every record of the unit, bad ones with their `problem`; UserError if the unit cannot be read."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        # all are large, and a task is given its unit
        return self.__dict__ | dict(_units=[], listing="", versions="")


class Shards(Source):
    """Files that are one work unit each. Training can also read them as they are."""

    store: Store

    def _list(self, suffixes: tuple[str, ...], what: str) -> None:
        """Find the files at `uri` that end in one of `suffixes`.

        `uri` is one of them, a folder, or a pattern of names in a folder: `*`, `?`, `{a,b}` and `{000..010}`.
        """
        if re.search(r"[*?{]", self.uri):
            sizes = self._matching(suffixes)
        else:
            self.store, self.uri, sizes = find(self.uri, suffixes)
        if not sizes:
            raise UserError(f"{self.uri} holds no {what} ({', '.join(suffixes)})")
        self.listing, self.versions = json.dumps(sizes), versions_of(self.store, sizes)
        self._units = [WorkUnit(name, size) for name, size in sizes.items()]

    def _matching(self, suffixes: tuple[str, ...]) -> dict[str, int]:
        """The files that a pattern names. Sets `store`."""
        folder, _, pattern = self.uri.rpartition("/")
        if re.search(r"[*?{]", folder):
            raise UserError(f"{self.uri}: a pattern may only stand in the names of files, after the last /")
        self.store = open_store(folder or ".")
        found = {name: size for name, size in self.store.sizes().items() if "/" not in name}
        sizes: dict[str, int] = {}
        for name in expand(pattern):
            matching = fnmatch.filter(found, name)
            if not matching:
                raise UserError(f"{self.store.address(name)} does not exist, but {pattern} names it")
            sizes |= {n: found[n] for n in matching if n.lower().endswith(suffixes)}
        return dict(sorted(sizes.items()))

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]:
        """The chunks of one file, for its manifest."""
        raise NotImplementedError


def find(uri: str, suffixes: tuple[str, ...]) -> tuple[Store, str, dict[str, int]]:
    """(store, complete address, sizes by name) of a file, or of the files in a folder that end in one of `suffixes`."""
    if uri.lower().endswith(suffixes):
        store, name = open_file(uri)
        return store, store.address(name), {name: store.size(name) or 0}
    store = open_store(uri)
    found = store.sizes()
    sizes = {n: size for n, size in found.items() if n.lower().endswith(suffixes) and n != MANIFEST}
    if strange := [n for n in found if re.search(r"\.tar\.\w+$", n.lower()) and n not in sizes]:
        raise UserError(f"{store.address(strange[0])} is compressed in a way that is not read; unpack it")
    return store, store.uri, sizes


def versions_of(store: Store, names: Collection[str]) -> str:
    """Changes when one of the files is written again."""
    found = store.versions(next(iter(names)) if len(names) == 1 else "")
    return json.dumps({name: found.get(name) for name in names})


def expand(pattern: str) -> list[str]:
    """The names that the braces of a pattern stand for: "{a,b}.tar", "{000..010}.tar"; `*` and `?` stay."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    options = found[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        options = [f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1)]
    return [name for option in options for name in expand(pattern[: found.start()] + option + pattern[found.end() :])]


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


def image_id_of(image: bytes) -> str:
    """The image_id of an image that states none: equal for equal bytes."""
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def open_file(uri: str) -> tuple[Store, str]:
    """The store and name of one file; UserError if it does not exist."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    if not store.exists(name):
        raise UserError(f"{store.address(name)} does not exist")
    return store, name


def pick_column(
    address: str, columns: Sequence[str], field: str, known: tuple[str, ...], chosen: str | None, remedy: str
) -> str:
    """The name of the column for a field: `chosen`, or else the first of `known` that there is."""
    name = next((name for name in ((chosen,) if chosen else known) if name in columns), None)
    if name is None:
        raise UserError(
            f"{address} has no {field} column {chosen or ' or '.join(known)}; it has {', '.join(columns)}; "
            f"name it with {remedy}"
        )
    return name


def name_in(store: Store, path: str) -> str | None:
    """`path`, relative or absolute, as a name in the store; None if it leads out of the store."""
    for prefix in (store.uri, store.root):
        if path.startswith(prefix.rstrip("/") + "/"):
            path = path[len(prefix.rstrip("/")) + 1 :]
            break
    name = posixpath.normpath(path)
    return None if name.startswith(("/", "..")) or name == "." or "://" in path else name


def is_too_long(name: str) -> bool:
    """Whether file systems refuse the name, or a folder in it, for its length."""
    encoded = name.encode("utf-8", "surrogateescape")
    return len(encoded) > 1024 or any(len(part) > 255 for part in encoded.split(b"/"))


def read_images(store: Store, paths: Iterable[str | tuple[str, ...]]) -> Iterator[tuple[bytes | None, str]]:
    """Image bytes and problem of each path, in order, read several at a time; a tuple gives alternatives."""

    def read(path: str | tuple[str, ...]) -> tuple[bytes | None, str]:
        for candidate in (path,) if isinstance(path, str) else path:
            name = name_in(store, candidate)
            if not is_unicode(candidate):
                return None, "the image path is not UTF-8"
            if not candidate.strip():
                return None, "there is no image path"
            if name is None and "://" in candidate:
                return None, "the image is an address; fetch the images first, for example with img2dataset"
            if name is None:
                return None, "the image path leads out of the image folder"
            if is_too_long(name):
                return None, "the image path is longer than a file name may be"
            try:
                return store.read(name), ""
            except FileNotFoundError:
                continue
        return None, "the image file is missing"

    paths = iter(paths)
    with ThreadPoolExecutor(8) as pool:
        while some := list(itertools.islice(paths, 32)):  # so that few images are in memory at once
            yield from pool.map(read, some)


def mean_image_bytes(store: Store, paths: Sequence[str | tuple[str, ...]]) -> int:
    """The mean size of some 64 of the images, evenly spaced; at least 1."""
    picks = paths[:: max(1, len(paths) // 64)]

    def size(path: str | tuple[str, ...]) -> int | None:
        names = [name_in(store, p) for p in ((path,) if isinstance(path, str) else path)]
        return next((s for s in (store.size(n) for n in names if n and not is_too_long(n)) if s is not None), None)

    with ThreadPoolExecutor(8) as pool:
        found = [s for s in pool.map(size, picks) if s is not None]
    if not found:
        raise UserError(
            f"none of {len(picks)} images that were tried is in {store.uri}, e.g. {picks[0] if picks else '-'!r}; "
            "name the image folder with images=..."
        )
    return max(1, sum(found) // len(found))
