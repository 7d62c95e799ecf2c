"""Made-up sources for the tests of preparation, and what they look at afterwards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from conftest import make_image

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.schema import Record
from vlmo_ray.data.store import Store


def read_all(uri: str) -> list[Record]:
    manifest = load_manifest(uri)
    store, chunks = Store(uri), map(manifest.chunk, range(manifest.num_chunks))
    records = [r for chunk in chunks for r in read_chunk(store, chunk, manifest.schema, retries=0)]
    assert all(r.problem == "" for r in records)
    return records


def ids(uri: str) -> list[str]:
    return [r.id for r in read_all(uri)]


def dropped(uri: str) -> list[dict]:
    return [json.loads(line) for line in Store(uri).read("dropped.jsonl").splitlines()]


def put(uri: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        Store(uri).write(name, data)


def tar_of(members: list[tuple[str, bytes]], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tars(num_tars: int, rows: int, extra: int = 0) -> dict[str, bytes]:
    """Tars named 000.tar, ...; `extra` random bytes after each image make them as large as wished."""
    noise = np.random.default_rng(0)
    return {
        f"{t:03d}.tar": tar_of(
            [
                (f"{i:04d}.{s}", make_image(i) + noise.bytes(extra) if s == "jpg" else f"text {t} {i}".encode())
                for i in range(rows)
                for s in ("jpg", "txt")
            ]
        )
        for t in range(num_tars)
    }


def files(folder: Path) -> dict[str, bytes]:
    """Contents by name; without what a writer that was killed left behind, which is in no store's list."""
    return {name: (folder / name).read_bytes() for name in Store(str(folder)).list()}


def damaged_gzip(data: bytes) -> bytes:
    """A gzip file of `data` with other bytes behind its header."""
    whole = gzip.compress(data)
    return whole[:10] + b"\xff" * 4 + whole[14:]
