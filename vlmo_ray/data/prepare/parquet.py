"""Parquet files with images and captions in them: Hugging Face's layout, img2dataset's, and our own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.index import check_stated, index_parquet, stored_schema
from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.prepare.source import Shards, WorkUnit, image_id_of, pick_column
from vlmo_ray.data.schema import Record, Schema
from vlmo_ray.errors import UserError

_KNOWN = {  # usual names of the columns of a pair
    "image": ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img"),
    "text": ("text", "caption", "captions", "sentences", "TEXT", "alt_text", "title"),
}


@dataclass
class Parquet(Shards):
    """The image column holds bytes, or a struct with `bytes`; the text column a string, or a list of them.

    A list gives one pair per caption. `id` and `image_id` columns are used if present; otherwise the id is
    `<file>:<row>`, and the image_id a hash of the image's bytes, so that equal images have equal ids. `columns` (see
    `Schema.parse`) declares other columns than an image and a text, by their own names; our own shards state theirs.
    """

    format: ClassVar[str] = "parquet"

    uri: str
    image_column: str | None = None
    text_column: str | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        self._list((".parquet",), "Parquet files")
        stated = stored_schema(self.store, self._units[0].name)
        self.schema = Schema.parse(self.columns) if self.columns else stated

    def _column(self, address: str, stored: list[str], field: str) -> str:
        chosen = {"image": self.image_column, "text": self.text_column}.get(field)
        remedy = f"{field}_column=..." if field in _KNOWN else "columns=..."
        return pick_column(address, stored, field, _KNOWN.get(field, (field,)), chosen, remedy)

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        address, row_number = self.store.address(unit.name), 0
        try:
            with self.store.open_input(unit.name) as file:
                # Pages are read as they are needed, so that a large row group is never in memory as a whole.
                parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                stored = parquet.schema_arrow.names
                check_stated(parquet.metadata, self.schema, address)
                columns = {name: self._column(address, stored, name) for name in self.schema.names}
                wanted = list({*columns.values(), *({"id", "image_id", "forbid"} & set(stored))})
                for batch in parquet.iter_batches(32, columns=wanted, use_threads=False):
                    for row in batch.to_pylist():
                        at = f"{unit.name}:{row_number}"
                        values = {name: row[column] for name, column in columns.items()}
                        yield from self._records(row, values, at)
                        row_number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{address} cannot be read as Parquet after row {row_number}: {error}") from error

    def _records(self, row: dict, values: dict, at: str) -> Iterator[Record]:
        """One record, or one for each text if there is a list of them."""
        images = [field.name for field in self.schema.fields if field.kind in ("image", "mask")]
        problem = ""
        for name in images:
            if isinstance(values[name], dict) and not values[name].get("bytes") and values[name].get("path"):
                problem = f"the {name} is a path without bytes"
            values[name] = values[name].get("bytes") if isinstance(values[name], dict) else values[name]
        image_id = row.get("image_id")
        if isinstance(image_id, float) and image_id.is_integer():
            image_id = int(image_id)  # pandas stores integers with a missing value as floats
        if image_id is None or (isinstance(image_id, float) and not math.isfinite(image_id)):
            encoded = values[images[0]] if images else None
            data = encoded if isinstance(encoded, bytes) else b""
            image_id = image_id_of(data)
        forbid, address = tuple(row.get("forbid") or ()), self.store.address(at)
        id = at if row.get("id") is None else str(row["id"])
        text = values.get("text")
        if not isinstance(text, list):
            yield Record(id, str(image_id), values, forbid, problem, address)
            return
        for k, caption in enumerate(text or [None]):
            yield Record(f"{id}#{k}", str(image_id), values | {"text": caption}, forbid, problem, address)

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]:
        """The row groups that there are, whatever `rows_per_chunk` is."""
        return index_parquet(self.store, [unit.name], self.schema)
