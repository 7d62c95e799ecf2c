"""What the public formats have in common: splits of work, images from folders, and a look at each image."""

from __future__ import annotations

import io
import itertools
import posixpath
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from vlmo_ray.data.manifest import MANIFEST
from vlmo_ray.data.read import Record
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

SPLIT_BYTES = 64 << 20  # of the pairs in one task, where the format lets us choose
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_PIXELS = 178_956_970  # the size at which Pillow itself suspects a decompression bomb


@dataclass(frozen=True)
class Split:
    """A piece of the source for one task; `bytes` estimates what its pairs take."""

    name: str
    bytes: int
    content: Any = None


class Source(Protocol):
    """A public format, opened. Picklable: `records` runs in other processes."""

    uri: str  # complete
    listing: str  # changes when the source does

    def splits(self) -> list[Split]: ...

    def records(self, split: Split) -> Iterator[Record]:
        """Every pair of the split, bad ones with their `problem`; UserError if the split cannot be read."""
        ...


def image_problem(image: bytes | None, verify: bool) -> str:
    """Why the encoded image cannot be used, "" if it can; reads its header, with `verify` also its pixels."""
    if not image:
        return "there is no image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image), formats=_IMAGE_FORMATS) as opened:
                if opened.width * opened.height > _MAX_PIXELS:
                    return "the image is too large"
                if verify:
                    opened.load()
    except Image.DecompressionBombError:
        return "the image is too large"
    except Exception as error:  # Pillow's readers raise nearly anything on damaged data
        if isinstance(error, MemoryError):
            raise
        return "the image cannot be decoded" if verify else "the image header is unreadable"
    return ""


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
