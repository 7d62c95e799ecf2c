"""A vector for every record of a data set: one Parquet file for each shard, on any number of machines.

A file is written as a whole when its shard is done, and a shard that has one is not done again: so each record has
exactly one row, whatever is killed. The vectors depend on the chunk of a record alone, not on workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmo_ray.config import ModelConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import Chunk, Manifest, load_manifest
from vlmo_ray.data.pipeline import plain_errors
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.read import chunk_address
from vlmo_ray.data.reader import Columns, Reader, one_chunk
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.pairs import columns_of
from vlmo_ray.progress import tracked
from vlmo_ray.runs.load import load
from vlmo_ray.search.vectors import What, encode, encoder_of, fingerprint
from vlmo_ray.session import actors, ray_session

DESCRIPTION = "embedding.json"  # what the vectors are of
_FOLDER = "vectors"
_BATCH = 64  # rows that are encoded at once
_AHEAD = 2  # chunks that wait, decoded


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What an index holds."""

    what: What
    data: str  # URI of the data set
    data_fingerprint: str
    weights: str  # address of the model
    weights_fingerprint: str
    width: int  # of a vector
    rows: int
    shards: int

    @classmethod
    def read(cls, store: Store) -> Embedding | None:
        """That of an index; None if the store holds none."""
        return cls(**json.loads(store.read(DESCRIPTION))) if store.exists(DESCRIPTION) else None


@dataclasses.dataclass(frozen=True)
class Done:
    """What `embed` did."""

    rows: int  # of all shards
    unreadable: int  # of these shards
    shards: int  # that were done now; the others were there
    seconds: float


def shard_file(shard: int) -> str:
    return f"{_FOLDER}/{shard:06d}.parquet"


def embed(
    weights: str,
    data: str,
    out: str,
    what: What = "image",
    *,
    num_workers: int | None = None,
    device: Literal["auto", "cpu", "gpu"] = "auto",
) -> Done:
    """Writes the vectors of the images or texts of `data` to `out`; what is there already stays. Joins or starts Ray
    once everything else is known to be there.

    Args:
        weights: a run, a checkpoint, or an imported folder.
        data: a data set that `vlmo prepare` wrote.
        out: a folder or `s3://bucket/prefix`.
        num_workers: how many actors work at once; default: one per GPU, or one for two CPUs. It changes nothing
            but the time.
        device: of the actors; auto: GPUs if the cluster has any now.

    Raises UserError if `out` holds vectors of other data or weights, and for a chunk that cannot be read.
    """
    began, manifest, model = time.monotonic(), load_manifest(data), load(weights).eval()
    encoder = encoder_of(model, what)
    reader = Reader(((manifest.uri, manifest.schema),), encoder)
    wanted = Embedding(
        what, manifest.uri, manifest.fingerprint, Store(weights).uri, fingerprint(model), model.config.width,
        manifest.num_rows, len(manifest.shards),
    )  # fmt: skip
    store = open_store(out, create=True)
    _claim(store, wanted)
    there = set(store.list(f"{_FOLDER}/"))
    items = [item for item in _items(manifest) if shard_file(item["shard"]) not in there]
    counts = np.bincount(manifest.chunk_shard, weights=manifest.chunk_rows, minlength=len(manifest.shards)).astype(int)
    unreadable, left = 0, len(items)
    done = int(manifest.num_rows - sum(counts[item["shard"]] for item in items))
    with ray_session() if items else contextlib.nullcontext():
        found = _run(items, model, reader, store.uri, what, num_workers, device)
        for _, bad in tracked(found, f"{what} vectors", manifest.num_rows, lambda one: int(counts[one[0]]), done):
            unreadable, left = unreadable + bad, left - 1
    assert not left
    return Done(manifest.num_rows, unreadable, len(items), time.monotonic() - began)


def _claim(store: Store, wanted: Embedding) -> None:
    before = Embedding.read(store)
    if before is None:
        store.write(DESCRIPTION, json.dumps(dataclasses.asdict(wanted), indent=1).encode())
        return
    for name in ("what", "data_fingerprint", "weights_fingerprint"):
        if getattr(before, name) != getattr(wanted, name):
            what = name.removesuffix("_fingerprint").replace("what", "kind")
            raise UserError(
                f"{store.uri} holds {before.what} vectors of {before.data} by {before.weights}: another {what}. Give "
                "another --out"
            )


def _items(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """A shard each: its number, and its chunks with their numbers in the manifest."""
    ends = np.flatnonzero(np.diff(manifest.chunk_shard, append=-1)) + 1
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        chunks = [(int(index), manifest.chunk(int(index))) for index in range(first, end)]
        yield {"shard": int(manifest.chunk_shard[first]), "chunks": chunks}


def _run(
    items: list[dict[str, Any]],
    model: VLMo,
    reader: Reader,
    out: str,
    what: What,
    num_workers: int | None,
    device: Literal["auto", "cpu", "gpu"],
) -> Iterator[tuple[int, int]]:
    """(shard, unreadable rows) of each, as they are done."""
    import ray

    if not items:
        return
    workers, cpus, gpus = actors(num_workers, device)
    workers = min(workers, len(items))
    threads = max(1, int(ray.cluster_resources().get("CPU", 1) // workers))
    state = ray.put({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    dataset = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    plain_errors(dataset)
    done = dataset.map_batches(
        _Actor,
        fn_constructor_args=(model.config, state, reader, out, what, threads, gpus > 0),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    try:
        for block in done.iter_batches(batch_size=None, batch_format="numpy"):
            yield from zip(block["shard"].tolist(), block["unreadable"].tolist(), strict=True)
    except UserError:
        raise
    except Exception as error:
        raise user_error(error) or error from None


class _Actor:
    """Shards -> their files. Threads decode the next chunks while one is encoded."""

    def __init__(self, config: ModelConfig, state, reader: Reader, out: str, what: What, threads: int, on_gpu: bool):
        import ray

        self.model = VLMo(config)
        self.model.load_state_dict(ray.get(state))
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.model.to(self.device).eval()
        self.reader, self.out = reader, Store(out)
        self.what: What = what
        if not on_gpu:
            torch.set_num_threads(threads)
        self.pool = ThreadPoolExecutor(max(1, threads))

    def __call__(self, block: Columns) -> Columns:
        items = [pickle.loads(item) for item in block["item"]]
        own = (self.model, self.what, self.reader, self.pool, self.out)
        found = [write_shard(*own, **item) for item in items]
        return {"shard": np.array([item["shard"] for item in items]), "unreadable": np.array(found)}


def write_shard(
    model: VLMo,
    what: What,
    reader: Reader,
    pool: ThreadPoolExecutor,
    out: Store,
    shard: int,
    chunks: list[tuple[int, Chunk]],
) -> int:
    """Writes the file of a shard: id, address, chunk and row of each record, its vector, or why there is none.

    Returns how many records have no vector.
    """
    tables, unreadable = [], 0
    place = Store(reader.places[0][0])
    for (index, chunk), columns in zip(chunks, _ahead(pool, reader, [chunk for _, chunk in chunks]), strict=True):
        vectors = _vectors(model, what, columns)
        valid = columns["valid"]
        unreadable += int((~valid).sum())
        rows = np.arange(chunk.rows, dtype=np.int32)
        flat = pa.array(vectors.reshape(-1), pa.float32())
        vector = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=pa.array(~valid))
        address = chunk_address(place, chunk)
        tables.append(
            pa.table(
                {
                    "id": pa.array(columns["id"].tolist(), pa.string()),
                    "address": pa.array([f"{address}:{row}" for row in rows], pa.string()),
                    "chunk": pa.array(np.full(chunk.rows, index, np.int32)),
                    "row": pa.array(rows),
                    "problem": pa.array(columns["problem"].tolist(), pa.string()),
                    "vector": vector,
                }
            )
        )
    with out.create(shard_file(shard)) as file:
        pq.write_table(pa.concat_tables(tables), file, compression="zstd")
    return unreadable


def _ahead(pool: ThreadPoolExecutor, reader: Reader, chunks: list[Chunk]) -> Iterator[Columns]:
    """The columns of each chunk, in order; a few are read before they are asked for."""

    waiting: deque[Future[Columns]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(reader, one_chunk(chunk)))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _vectors(model: VLMo, what: What, columns: Columns) -> np.ndarray:
    """float32 [rows, D]."""
    batch, device = Batch.from_numpy(columns), model.norm.weight.device
    parts = columns_of(len(batch), _BATCH)
    return np.concatenate([encode(model, what, batch.rows(part).to(device)).cpu().numpy() for part in parts])
