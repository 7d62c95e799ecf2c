"""Parquet files with images and captions in them: Hugging Face's layout, img2dataset's, and our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.index import check_stated, index_parquet, stored_schema
from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.prepare.source import WorkUnit, list_shards
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.errors import UserError

_KNOWN = {  # what others call the fields of a pair
    "image": ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img"),
    "text": ("text", "caption", "captions", "sentences", "TEXT", "alt_text", "title"),
}


@dataclass
class Parquet:
    """The image column holds bytes, or a struct with `bytes`; the text column a string, or a list of them.

    A list gives one pair per caption. `id` and `image_id` columns are used where present; else the id is
    `<file>:<row>`, and the image_id a hash of the image's bytes, so that equal images are known as such.
    `columns` (see `Schema.parse`) declares other columns than an image and a text, by their own names; our own
    shards state theirs.
    """

    format: ClassVar[str] = "parquet"

    uri: str
    image_column: str | None = None
    text_column: str | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        self.uri, self.store, self.sizes = list_shards(self.uri, (".parquet",), what="Parquet files")
        self.listing = json.dumps(self.sizes)
        stated = stored_schema(self.store, next(iter(self.sizes)))
        self.schema = Schema.parse(self.columns) if self.columns else stated

    def units(self) -> list[WorkUnit]:
        return [WorkUnit(name, size) for name, size in self.sizes.items()]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"sizes": {}, "listing": ""}

    def _column(self, address: str, stored: pa.Schema, field: Field) -> str:
        known = _KNOWN.get(field.name, (field.name,))
        chosen = {"image": self.image_column, "text": self.text_column}.get(field.name)
        name = chosen or next((name for name in known if name in stored.names), None)
        if name not in stored.names:
            remedy = f"{field.name}_column=..." if field.name in _KNOWN else "columns=..."
            raise UserError(
                f"{address} has no {field.name} column {chosen or ' or '.join(known)}; it has "
                f"{', '.join(stored.names)}; name it with {remedy}"
            )
        return name

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        address, row_number = self.store.address(unit.name), 0
        try:
            with self.store.open_input(unit.name) as file:
                # Pages are read as they are needed, so that a large row group is not held at once.
                parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                stored = parquet.schema_arrow
                check_stated(parquet.metadata, self.schema, address)
                columns = {field.name: self._column(address, stored, field) for field in self.schema.fields}
                others = [name for name in ("id", "image_id", "forbid") if name in stored.names]
                wanted = list({*columns.values(), *others})
                for batch in parquet.iter_batches(32, columns=wanted, use_threads=False):
                    for row in batch.to_pylist():
                        at = f"{unit.name}:{row_number}"
                        values = {name: row[column] for name, column in columns.items()}
                        yield from self._records(row, values, at)
                        row_number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{address} cannot be read as Parquet after row {row_number}: {error}") from error

    def _records(self, row: dict, values: dict, at: str) -> Iterator[Record]:
        """One record, or one per text where there is a list of them."""
        images = [field.name for field in self.schema.fields if field.kind in ("image", "mask")]
        for name in images:
            values[name] = values[name].get("bytes") if isinstance(values[name], dict) else values[name]
        image_id = row.get("image_id")
        if image_id is None:
            encoded = values[images[0]] if images else None
            data = encoded if isinstance(encoded, bytes) else b""
            image_id = hashlib.blake2b(data, digest_size=16).hexdigest()
        forbid, address = tuple(row.get("forbid") or ()), self.store.address(at)
        id = at if row.get("id") is None else str(row["id"])
        text = values.get("text")
        if not isinstance(text, list):
            yield Record(id, str(image_id), values, forbid, address=address)
            return
        for k, caption in enumerate(text):
            yield Record(f"{id}#{k}", str(image_id), values | {"text": caption}, forbid, address=address)

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]:
        """Row groups are as they are, whatever `rows_per_chunk` is."""
        return index_parquet(self.store, [unit.name], self.schema)
