"""WebDataset tars, those that img2dataset writes included."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

from vlmo_ray.data.prepare.source import Split, list_shards
from vlmo_ray.data.read import Record
from vlmo_ray.data.tar import TarError, iter_groups, iter_members, pair_fields
from vlmo_ray.errors import UserError


@dataclass
class WebDataset:
    """Every tar (also `.tar.gz`, `.tgz`) of a folder or prefix: `<key>.jpg`, `<key>.txt`, `<key>.json`.

    `id` and `image_id` come from the JSON where it has them, else both are `<tar name>/<key>`. A caption may
    also be the JSON's `caption`.
    """

    uri: str

    def __post_init__(self) -> None:
        self.uri, self.store, self.sizes = list_shards(self.uri, (".tar", ".tar.gz", ".tgz"), what="tars")
        self.listing = json.dumps(self.sizes)

    def splits(self) -> list[Split]:
        return [Split(name, size) for name, size in self.sizes.items()]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"sizes": {}, "listing": ""}

    def records(self, split: Split) -> Iterator[Record]:
        address = self.store.address(split.name)
        try:
            with self.store.open_stream(split.name) as file:
                stream = (
                    file if split.name.endswith(".tar") else gzip.GzipFile(fileobj=io.BufferedReader(file))
                )
                for group in iter_groups(iter_members(stream.read)):
                    if group.is_record:
                        yield Record(**pair_fields(split.name, group), address=f"{address}#{group.key}")
        except (TarError, OSError, EOFError) as error:
            raise UserError(f"{address}: {error}; fetch or make this tar again") from error
