"""What is most similar to a query, among the vectors that `vlmo embed` wrote: exactly, or with faiss for millions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.manifest import Manifest, load_manifest
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.schema import Record
from vlmo_ray.data.store import Store, open_store, store_and_name
from vlmo_ray.errors import RecordError, UserError
from vlmo_ray.search.embed import DESCRIPTION, Embedding, shard_file
from vlmo_ray.search.vectors import What, encode, encoder_of, fingerprint

if TYPE_CHECKING:
    from vlmo_ray.model.vlmo import VLMo

FAISS = "faiss.index"
_LISTS_FROM = 50_000  # rows: below, faiss compares all
_NAMES = ["id", "address", "chunk", "row"]
_CHUNKS = 32  # of records that stay in memory
_PROBES = 32  # lists that faiss looks into
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Found:
    """A record, and its cosine similarity with the query."""

    score: float
    id: str
    address: str
    chunk: int  # in the manifest
    row: int


class Index:
    """The vectors of a data set; nothing is loaded before it is asked for."""

    def __init__(self, uri: str):
        """Raises UserError if there is no index, or a shard of it is missing."""
        self.store = open_store(uri)
        found = Embedding.read(self.store)
        if found is None:
            raise UserError(f"{self.store.uri} holds no vectors: it has no {DESCRIPTION}. `vlmo embed` makes them")
        there = set(self.store.list("vectors/"))
        missing = sum(shard_file(shard) not in there for shard in range(found.shards))
        if missing:
            raise UserError(
                f"{self.store.uri} lacks {missing:,} of {found.shards:,} shards: give the same `vlmo embed` again, it "
                "goes on where it stopped"
            )
        self.embedding = found
        self._manifest: Manifest | None = None
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._named: dict[int, pa.Table] = {}
        self._chunks: dict[int, list[Record]] = {}
        self._faiss = None

    def search(self, queries: np.ndarray, top: int) -> list[list[Found]]:
        """The records most similar to each of float32 [Q,D], the best first, by looking at all; equal ones in the
        order of the data set. One shard is in memory at a time."""
        scores = np.full((len(queries), 0), -np.inf, np.float32)
        places = np.zeros((len(queries), 0), np.int64)  # shard << 32 | row of its file
        for shard in range(self.embedding.shards):
            vectors, rows = self._vectors(shard)
            scores = np.concatenate([scores, queries @ vectors.T], axis=1)
            own = np.broadcast_to((shard << 32) + rows, (len(queries), len(rows)))
            places = np.concatenate([places, own], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            scores, places = (np.take_along_axis(x, best, axis=1) for x in (scores, places))
        return self._found(scores, places)

    def search_fast(self, queries: np.ndarray, top: int) -> list[list[Found]]:
        """As `search`, by faiss, which `build_fast` has prepared: some of the best may be missed."""
        scores, places = self._load_faiss().search(np.ascontiguousarray(queries), top)
        return self._found(scores, places)

    def _load_faiss(self):
        if self._faiss is None:
            faiss = _faiss()
            if not self.store.exists(FAISS):
                raise UserError(f"{self.store.uri} has no {FAISS}; vlmo search INDEX QUERY --build-faiss makes it")
            self._faiss = faiss.deserialize_index(np.frombuffer(self.store.read(FAISS), np.uint8))
        return self._faiss

    def build_fast(self) -> str:
        """Writes the index of faiss beside the vectors: lists around sqrt(N) centres, or one list if they are few."""
        faiss = _faiss()
        width, rows = self.embedding.width, self.embedding.rows
        built = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        if rows >= _LISTS_FROM:
            built = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, int(rows**0.5), faiss.METRIC_INNER_PRODUCT)
            built.nprobe = _PROBES
            built.train(self._sample(40 * built.nlist))
        for shard in range(self.embedding.shards):
            vectors, numbers = self._vectors(shard)
            if len(vectors):
                built.add_with_ids(vectors, (shard << 32) + numbers)
        self.store.write(FAISS, faiss.serialize_index(built).tobytes())
        return self.store.address(FAISS)

    def keep(self, fast: bool) -> None:
        """From now on all that queries need stays in memory: vectors, or with `fast` the index of faiss, and names."""
        if fast:
            self._load_faiss()
        else:
            self._kept = {shard: self._vectors(shard) for shard in range(self.embedding.shards)}
        self._named = {shard: self._read(shard, _NAMES) for shard in range(self.embedding.shards)}

    def record(self, found: Found) -> Record:
        """The stored record."""
        record = self.record_at(found.chunk, found.row)
        assert record is not None, found
        return record

    def record_at(self, chunk: int, row: int) -> Record | None:
        """The record in this row of a chunk of the data set, None if there is none."""
        if self._manifest is None:
            self._manifest = load_manifest(self.embedding.data)
        manifest = self._manifest
        if manifest.fingerprint != self.embedding.data_fingerprint:
            raise UserError(f"{manifest.uri} has changed since its vectors were made; embed it again")
        if not (0 <= chunk < manifest.num_chunks and 0 <= row < manifest.chunk_rows[chunk]):
            return None
        return self._chunk(chunk)[row]

    def _chunk(self, chunk: int) -> list[Record]:
        """The records of a chunk; the last few chunks are kept."""
        if chunk not in self._chunks:
            manifest = self._manifest
            assert manifest is not None
            if len(self._chunks) >= _CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[chunk] = read_chunk(Store(manifest.uri), manifest.chunk(chunk), manifest.schema)
        return self._chunks[chunk]

    def _vectors(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [n,D], rows of the file int64 [n]) of the records of a shard that have a vector."""
        if shard in self._kept:
            return self._kept[shard]
        column = self._read(shard, ["vector"]).column("vector").combine_chunks()
        there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        flat = column.flatten().to_numpy()  # without those that are null
        return flat.reshape(-1, self.embedding.width), there.astype(np.int64)

    def _sample(self, count: int) -> np.ndarray:
        """Vectors of evenly spread shards, at least `count` if there are as many."""
        parts, missing = [], count
        for shard in np.random.default_rng(0).permutation(self.embedding.shards):
            parts.append(self._vectors(int(shard))[0])
            missing -= len(parts[-1])
            if missing <= 0:
                break
        return np.concatenate(parts)

    def _read(self, shard: int, columns: list[str]):
        with self.store.open_input(shard_file(shard)) as file:  # of which only these columns are fetched
            return pq.read_table(file, columns=columns)

    def _found(self, scores: np.ndarray, places: np.ndarray) -> list[list[Found]]:
        """The records at (shard << 32 | row of its file), of each query; -1 is none."""
        shards = np.unique(places[places >= 0] >> 32)
        tables = {int(shard): self._named.get(int(shard)) or self._read(int(shard), _NAMES) for shard in shards}
        found = []
        for own_scores, own_places in zip(scores, places, strict=True):
            some = []
            for score, place in zip(own_scores.tolist(), own_places.tolist(), strict=True):
                if place >= 0:
                    table, row = tables[place >> 32], place & 0xFFFFFFFF
                    some.append(Found(score, **{name: table.column(name)[row].as_py() for name in _NAMES}))
            found.append(some)
        return found


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise UserError("faiss is not installed: pip install 'vlmo-ray[search]', or search without it") from error
    return faiss


class Queries:
    """Texts and images as vectors of the model of an index."""

    def __init__(self, index: Index, weights: str = ""):
        """`weights`: where the model is by now, if not where it was. Raises UserError if it is another model."""
        from vlmo_ray.runs.load import load

        self.model: VLMo = load(weights or index.embedding.weights).eval()
        if fingerprint(self.model) != index.embedding.weights_fingerprint:
            raise UserError(
                f"{weights or index.embedding.weights} is another model than the one that made {index.store.uri}; name "
                "the right one by --model, or embed again"
            )

    def text(self, text: str) -> np.ndarray:
        """float32 [1,D]. Raises UserError for a text that cannot be used."""
        return self._vector("text", text)

    def image(self, data: bytes) -> np.ndarray:
        """float32 [1,D] of an encoded image. Raises UserError if it is none."""
        return self._vector("image", data)

    def of(self, query: str) -> tuple[np.ndarray, bytes]:
        """(vector, b"") of a text; (vector, the file) if `query` is the name of an image file, which must be there."""
        if Path(query).suffix.lower() not in _IMAGES:
            return self.text(query), b""
        store, name = store_and_name(query if query.startswith("s3://") else os.path.abspath(query))
        try:
            data = store.read(name)
            return self.image(data), data
        except FileNotFoundError as error:
            raise UserError(f"{query} does not exist; a text must not end in {Path(query).suffix}") from error

    def _vector(self, what: What, value: str | bytes) -> np.ndarray:
        from vlmo_ray.data.batch import Batch

        try:
            row = encoder_of(self.model, what)(Record("query", "query", {what: value}), None)
        except RecordError as error:
            raise UserError(f"the query cannot be used: {error}") from error
        facts = {"valid": True, "id": "", "problem": "", "step": 0, "position": 0}
        columns = {name: np.array([value]) for name, value in (row | facts).items()}
        return encode(self.model, what, Batch.from_numpy(columns)).numpy()
