"""Karpathy's `dataset_*.json` of COCO, Flickr8k and Flickr30k, with a folder of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.source import WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import PAIRS, Record, Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError


@dataclass
class Karpathy:
    """One pair per caption; `image_id` is the file name. `split` may join several: "train+restval".

    Images are looked for in `images`, by default the folder `images` beside the JSON; those of COCO first in
    the entry's `filepath` (`val2014/...`) below it.
    """

    format: ClassVar[str] = "karpathy"
    schema: ClassVar[Schema] = PAIRS

    uri: str  # of the JSON, or of a folder with exactly one dataset_*.json
    split: str = "train"
    images: str | None = None

    def __post_init__(self) -> None:
        if not self.uri.endswith(".json"):
            store = open_store(self.uri)
            names = [n for n in store.list("dataset_") if n.endswith(".json") and "/" not in n]
            if len(names) != 1:
                raise UserError(f"{store.uri} holds {len(names)} files dataset_*.json; give the path of one")
            self.uri = store.address(names[0])
        store, self._name = open_file(self.uri)
        self.uri = store.address(self._name)
        try:
            self._images: Store = open_store(self.images or store.address("images"))
        except UserError as error:
            raise UserError(f"{error}; name the image folder with images=...") from error
        data = store.read(self._name)
        self.listing = hashlib.sha256(data).hexdigest()
        try:
            entries = json.loads(data)["images"]
            wanted = self.split.split("+")
            present = sorted({entry["split"] for entry in entries})
            if unknown := [name for name in wanted if name not in present]:
                raise UserError(f"{self.uri} has no split {unknown[0]!r}; it has {', '.join(present)}")
            self._entries = [
                {
                    "image_id": entry.get("filename") or str(entry["imgid"]),
                    "paths": tuple(
                        f"{folder}{entry['filename']}"
                        for folder in ((f"{entry['filepath']}/" if entry.get("filepath") else ""), "")
                    ),
                    "captions": [(str(s["sentid"]), s.get("raw")) for s in entry["sentences"]],
                }
                for entry in entries
                if entry["split"] in wanted
            ]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.uri} is not in Karpathy's format: {type(error).__name__} {error}") from error

    def units(self) -> list[WorkUnit]:
        mean = mean_image_bytes(self._images, [entry["paths"] for entry in self._entries])
        return cut_units(self._name, ((entry, mean * len(entry["captions"])) for entry in self._entries))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_entries": []}  # a task has those of its unit

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (entry["paths"] for entry in unit.content))
        for entry, (image, problem) in zip(unit.content, images, strict=True):
            for number, text in entry["captions"]:
                id = f"{entry['image_id']}#{number}"
                values = {"image": image, "text": text}
                address = f"{self.uri}#{number}"
                yield Record(id, entry["image_id"], values, problem=problem, address=address)
