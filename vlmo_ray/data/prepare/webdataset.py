"""WebDataset tars, also those of img2dataset."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.data.index import index_tar
from vlmo_ray.data.manifest import Chunk
from vlmo_ray.data.prepare.source import Shards, WorkUnit, image_id_of
from vlmo_ray.data.schema import PAIRS, Record, Schema, encodable
from vlmo_ray.data.tar import IMAGE_SUFFIXES, Sample, TarError, iter_members, iter_samples, record_of
from vlmo_ray.errors import UserError


@dataclass
class WebDataset(Shards):
    """Every tar (also `.tar.gz`, `.tgz`, `.tar.bz2`) of a folder or prefix: `<key>.jpg`, `<key>.txt`, `<key>.json`.

    `id` and `image_id` come from the JSON if it has them. Otherwise the id is `<tar name>/<key>`, and the image_id a
    hash of the image's bytes, so that equal images have equal ids; tars that are indexed keep `<tar name>/<key>`. A
    caption may also be the JSON's `caption`; a list of captions gives a pair for each. `columns` (see `Schema.parse`)
    declares other columns than an image and a text, for example "image,label" for tars with `<key>.jpg` and
    `<key>.cls`; `tar.record_of` says where each comes from.
    """

    format: ClassVar[str] = "webdataset"

    uri: str
    columns: str | None = None

    def __post_init__(self) -> None:
        self._list((".tar", ".tar.gz", ".tgz", ".tar.bz2"), "tars")
        self.schema = Schema.parse(self.columns) if self.columns else PAIRS

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        address = self.store.address(unit.name)
        try:
            with self.store.open_stream(unit.name) as file:
                name, stream = unit.name.lower(), file
                if not name.endswith(".tar"):
                    buffered = io.BufferedReader(file)
                    stream = bz2.BZ2File(buffered) if name.endswith("bz2") else gzip.GzipFile(fileobj=buffered)
                for sample in iter_samples(iter_members(stream.read)):
                    for record in self._records(unit.name, sample):
                        record.address = f"{address}#{sample.key}"
                        yield record
        except (TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{address}: {error}; fetch or make this tar again") from error

    def _records(self, tar_name: str, sample: Sample) -> Iterator[Record]:
        """The record of a sample, and one with a problem for each that it hides; none for a lone JSON."""
        record = record_of(tar_name, sample, self.schema)
        image = record.values.get("image")
        if record.image_id == encodable(f"{tar_name}/{sample.key}") and isinstance(image, bytes):
            record.image_id = image_id_of(image)
        if sample.links:
            record.problem = "a member is a link, which has no data in the tar"
        dotted = [suffix for suffix in sample.files if "." in suffix and suffix.endswith(IMAGE_SUFFIXES)]
        if not sample.is_record(self.schema) and dotted:
            problem = "the name has further dots, and a key ends at the first"
            yield from (replace(record, id=f"{record.id}.{suffix}", problem=problem) for suffix in dotted)
        elif isinstance(texts := record.values.get("text"), list):
            for k, text in enumerate(texts):
                yield replace(record, id=f"{record.id}#{k}", values=record.values | {"text": text})
            if not texts:
                yield replace(record, problem="the list of captions is empty")
        elif sample.links or set(sample.files) - {"json"}:
            yield record
        if sample.repeated:
            yield replace(record, problem="the key is there twice in a row")

    def chunks(self, unit: WorkUnit, rows_per_chunk: int) -> list[Chunk]:
        return index_tar(self.store, [unit.name], rows_per_chunk, self.schema)
