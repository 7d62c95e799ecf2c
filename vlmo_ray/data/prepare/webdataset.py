"""WebDataset tars, also those of img2dataset."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.index import index_tar
from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.prepare.source import Shards, WorkUnit
from vlmo_ray.data.schema import PAIRS, Record, Schema
from vlmo_ray.data.tar import TarError, iter_members, iter_samples, record_of
from vlmo_ray.errors import UserError


@dataclass
class WebDataset(Shards):
    """Every tar (also `.tar.gz`, `.tgz`) of a folder or prefix: `<key>.jpg`, `<key>.txt`, `<key>.json`.

    `id` and `image_id` come from the JSON if it has them, otherwise both are `<tar name>/<key>`. A caption may also be
    the JSON's `caption`. `columns` (see `Schema.parse`) declares other columns than an image and a text, for example
    "image,label" for tars with `<key>.jpg` and `<key>.cls`; `tar.record_of` says where each comes from.
    """

    format: ClassVar[str] = "webdataset"

    uri: str
    columns: str | None = None

    def __post_init__(self) -> None:
        self._list((".tar", ".tar.gz", ".tgz"), "tars")
        self.schema = Schema.parse(self.columns) if self.columns else PAIRS

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        address = self.store.address(unit.name)
        try:
            with self.store.open_stream(unit.name) as file:
                stream = file if unit.name.endswith(".tar") else gzip.GzipFile(fileobj=io.BufferedReader(file))
                for sample in iter_samples(iter_members(stream.read)):
                    if sample.is_record(self.schema):
                        record = record_of(unit.name, sample, self.schema)
                        record.address = f"{address}#{sample.key}"
                        yield record
        except (TarError, OSError, EOFError) as error:
            raise UserError(f"{address}: {error}; fetch or make this tar again") from error

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]:
        return index_tar(self.store, [unit.name], rows_per_chunk, self.schema)
