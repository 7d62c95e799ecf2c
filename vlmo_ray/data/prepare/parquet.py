"""Parquet files with images and captions in them: Hugging Face's layout, img2dataset's, and our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.prepare.source import Split, list_shards
from vlmo_ray.data.read import Record
from vlmo_ray.errors import UserError

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img")
_TEXT_COLUMNS = ("text", "caption", "captions", "sentences", "TEXT", "alt_text", "title")


@dataclass
class Parquet:
    """The image column holds bytes, or a struct with `bytes`; the text column a string, or a list of them.

    A list gives one pair per caption. `id` and `image_id` columns are used where present; else the id is
    `<file>:<row>`, and the image_id a hash of the image's bytes, so that equal images are known as such.
    """

    uri: str
    image_column: str | None = None
    text_column: str | None = None

    def __post_init__(self) -> None:
        self.uri, self.store, self.sizes = list_shards(self.uri, (".parquet",), what="Parquet files")
        self.listing = json.dumps(self.sizes)

    def splits(self) -> list[Split]:
        return [Split(name, size) for name, size in self.sizes.items()]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"sizes": {}, "listing": ""}

    def _column(self, address: str, schema: pa.Schema, chosen: str | None, known: tuple[str, ...], what: str):
        name = chosen or next((name for name in known if name in schema.names), None)
        if name not in schema.names:
            raise UserError(
                f"{address} has no {what} column {chosen or ' or '.join(known)}; it has "
                f"{', '.join(schema.names)}; name it with {what}_column=..."
            )
        return name

    def records(self, split: Split) -> Iterator[Record]:
        address, row_number = self.store.address(split.name), 0
        try:
            with self.store.open_input(split.name) as file:
                # Pages are read as they are needed, so that a large row group is not held at once.
                parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                schema = parquet.schema_arrow
                image = self._column(address, schema, self.image_column, _IMAGE_COLUMNS, "image")
                text = self._column(address, schema, self.text_column, _TEXT_COLUMNS, "text")
                others = [name for name in ("id", "image_id", "forbid") if name in schema.names]
                for batch in parquet.iter_batches(
                    32, columns=list({image, text, *others}), use_threads=False
                ):
                    for row in batch.to_pylist():
                        at = f"{split.name}:{row_number}"
                        yield from _pairs(row, row[image], row[text], at, self.store.address(at))
                        row_number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{address} cannot be read as Parquet after row {row_number}: {error}") from error


def _pairs(row: dict, image, text, at: str, address: str) -> Iterator[Record]:
    image = image.get("bytes") if isinstance(image, dict) else image
    problem = "" if image is None or isinstance(image, bytes) else "the image column does not hold bytes"
    image = None if problem else image
    image_id = row.get("image_id")
    if image_id is None:
        image_id = hashlib.blake2b(image or b"", digest_size=16).hexdigest()
    id, forbid = row.get("id"), tuple(row.get("forbid") or ())
    id = at if id is None else str(id)
    several = isinstance(text, list)
    for k, caption in enumerate(text if several else [text]):
        name = f"{id}#{k}" if several else id
        yield Record(name, str(image_id), image, caption, forbid, problem, address)
