"""A part, the unit of data work: some chunks are read once, and the wanted rows become NumPy columns.

This is all that runs in a data task, so nothing here (or imported from here) knows torch or Ray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import DecodeError, decode_eval, decode_train
from vlmo_ray.data.manifest import Chunk, Manifest
from vlmo_ray.data.order import Rows
from vlmo_ray.data.read import DamagedShard, Record, read_chunk
from vlmo_ray.data.store import Store
from vlmo_ray.data.text import (
    CLS_ID,
    IGNORED_LABEL,
    SEP_ID,
    TextError,
    Tokenizer,
    mask_whole_words,
    normalise,
)

Columns = dict[str, np.ndarray]

GREY = 128


@dataclass(frozen=True)
class Part:
    """Rows of a few chunks, with their places in the run; the arrays are int `[n]`.

    In an evaluation a row's place is where it is stored: `step` is its chunk, `position` its row.
    """

    chunks: tuple[Chunk, ...]
    chunk: np.ndarray  # index into `chunks`
    row: np.ndarray  # in that chunk
    step: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def make_part(manifest: Manifest, rows: Rows) -> Part:
    chunks, index = np.unique(rows.chunk, return_inverse=True)
    described = tuple(manifest.chunk(int(chunk)) for chunk in chunks)
    return Part(described, index.astype(np.int32), rows.row.astype(np.int32), rows.step, rows.position)


@dataclass(frozen=True)
class TrainReader:
    """Part -> the columns of a training batch, rows in the order of the part.

    image uint8 `[n, 3, H, W]`, text_ids, mlm_ids, mlm_labels int32 `[n, T]`, text_mask bool `[n, T]`,
    image_key, text_key int64 `[n]`, valid bool `[n]`, step, position int64 `[n]`, id, problem str `[n]`.

    A record that cannot be used gives a grey image, an empty text and valid = False, and `problem` says
    why, with its address. A chunk that cannot be read raises `ShardError`. With `data.bad_shards` "mask", one that
    is itself at fault (`DamagedShard`) is so many records that cannot be used.
    """

    uri: str
    data: DataConfig
    image_size: int
    max_text_len: int
    vocab_size: int
    mlm_probability: float
    seed: int

    def __call__(self, part: Part) -> Columns:
        def decode(record: Record, i: int) -> np.ndarray:
            place = int(part.step[i]), int(part.position[i])
            return decode_train(record.image, self.image_size, self.data, record.forbid, self.seed, *place)

        store = Store(self.uri, self.data.retry_timeout_s)
        mask = self.data.bad_shards == "mask"
        columns = _read(part, store, self.image_size, self.max_text_len, decode, mask)
        word, image_id, text = (columns.pop(name) for name in ("word", "image_id", "text"))
        columns["mlm_ids"] = columns["text_ids"].copy()
        columns["mlm_labels"] = np.full_like(columns["text_ids"], IGNORED_LABEL)
        columns["image_key"] = np.array([rng.hash_text(key) for key in image_id], dtype=np.int64)
        columns["text_key"] = np.array([rng.hash_text(normalise(key)) for key in text], dtype=np.int64)
        for i in np.flatnonzero(columns["valid"]):
            generator = rng.generator(self.seed, "mlm", int(part.step[i]), int(part.position[i]))
            columns["mlm_ids"][i], columns["mlm_labels"][i] = mask_whole_words(
                columns["text_ids"][i], word[i], self.vocab_size, self.mlm_probability, generator
            )
        columns["step"], columns["position"] = part.step, part.position
        return columns

    def failure(self, sentence: str) -> Columns:
        """One row at step -1 with this `problem`: the message of a task that could not read its part."""
        columns = self(Part((), *np.full((4, 1), -1)))
        columns["problem"][0] = sentence
        return columns


@dataclass(frozen=True)
class EvalReader:
    """Part -> columns without any draw, and without masking.

    image, text_ids, text_mask, valid, id and problem as in `TrainReader`; image_id, text str `[n]`; chunk and
    row int64 `[n]`, where the row is stored.
    """

    uri: str
    image_size: int
    max_text_len: int

    def __call__(self, part: Part) -> Columns:
        def decode(record: Record, i: int) -> np.ndarray:
            return decode_eval(record.image, self.image_size)

        columns = _read(part, Store(self.uri), self.image_size, self.max_text_len, decode)
        del columns["word"]
        columns["chunk"], columns["row"] = part.step, part.position
        return columns


@functools.lru_cache(maxsize=2)
def _tokenizer(max_len: int) -> Tokenizer:  # a data process builds it once
    return Tokenizer(max_len)


def _read(
    part: Part,
    store: Store,
    image_size: int,
    max_text_len: int,
    decode: Callable[[Record, int], np.ndarray],
    mask_chunks: bool = False,
) -> Columns:
    n = len(part)
    image = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    text_ids = np.zeros((n, max_text_len), dtype=np.int32)
    text_ids[:, :2] = CLS_ID, SEP_ID
    text_mask = np.zeros((n, max_text_len), dtype=bool)
    text_mask[:, :2] = True
    word = np.full((n, max_text_len), -1, dtype=np.int16)
    strings = {name: np.full(n, "", dtype=object) for name in ("id", "image_id", "text")}
    strings["problem"] = np.full(n, "not read", dtype=object)
    tokenizer = _tokenizer(max_text_len)
    for index, chunk in enumerate(part.chunks):
        rows = np.flatnonzero(part.chunk == index)
        try:
            records = read_chunk(store, chunk)
        except DamagedShard as error:
            if not mask_chunks:
                raise
            address = f"{store.address(chunk.shard)}#{chunk.index}"
            for i in rows:
                unread = f"{address}:{part.row[i]}"
                strings["id"][i] = strings["image_id"][i] = strings["text"][i] = unread
                strings["problem"][i] = f"{unread}: its chunk is masked: {error}"
            continue
        for i in rows:
            record = records[part.row[i]]
            strings["id"][i] = _id(record)
            strings["image_id"][i] = _encodable(record.image_id or record.address)
            try:
                if record.problem:
                    raise DecodeError(record.problem)
                pixels, encoded = decode(record, i), tokenizer.encode(record.text)
            except (DecodeError, TextError) as error:
                strings["problem"][i] = _encodable(f"{record.address}: {error}")
                strings["text"][i] = record.address  # its own may be anything; this is like no other
            else:
                strings["text"][i], strings["problem"][i] = record.text, ""
                image[i] = pixels
                text_ids[i], text_mask[i], word[i] = encoded
    valid = np.array([not problem for problem in strings["problem"]], dtype=bool)
    image[~valid] = GREY
    arrays = {"image": image, "text_ids": text_ids, "text_mask": text_mask, "word": word, "valid": valid}
    return arrays | strings


def chunk_ids(store: Store, chunk: Chunk) -> dict[str, str]:
    """Address -> id of a chunk's rows, as a batch has them: the rows of a damaged one have their addresses for ids."""
    try:
        return {record.address: _id(record) for record in read_chunk(store, chunk)}
    except DamagedShard:
        addresses = [f"{store.address(chunk.shard)}#{chunk.index}:{row}" for row in range(chunk.rows)]
        return dict(zip(addresses, addresses, strict=True))


def _id(record: Record) -> str:
    return _encodable(record.id or record.address)


def _encodable(text: str) -> str:
    """JSON in a tar can hold half a surrogate pair, which neither a hash nor an Arrow column takes."""
    return text.encode("utf-8", "replace").decode()
