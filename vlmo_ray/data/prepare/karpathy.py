"""Karpathy's `dataset_*.json` of COCO, Flickr8k and Flickr30k, with a folder of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from vlmo_ray.data.prepare.source import (
    SPLIT_BYTES,
    Split,
    mean_image_bytes,
    open_file,
    read_images,
)
from vlmo_ray.data.read import Record
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError


@dataclass
class Karpathy:
    """One pair per caption; `image_id` is the file name. `split` may join several: "train+restval".

    Images are looked for in `images`, by default the folder `images` beside the JSON; those of COCO first in
    the entry's `filepath` (`val2014/...`) below it.
    """

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
            raise UserError(
                f"{self.uri} is not in Karpathy's format: {type(error).__name__} {error}"
            ) from error

    def splits(self) -> list[Split]:
        mean = mean_image_bytes(self._images, [entry["paths"] for entry in self._entries])
        splits, content, size = [], [], 0
        for entry in self._entries:
            content.append(entry)
            size += mean * len(entry["captions"])
            if size >= SPLIT_BYTES:
                splits.append(Split(f"{self._name} part {len(splits)}", size, content))
                content, size = [], 0
        if content:
            splits.append(Split(f"{self._name} part {len(splits)}", size, content))
        return splits

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_entries": []}  # a task has those of its split

    def records(self, split: Split) -> Iterator[Record]:
        images = read_images(self._images, (entry["paths"] for entry in split.content))
        for entry, (image, problem) in zip(split.content, images, strict=True):
            for number, text in entry["captions"]:
                id = f"{entry['image_id']}#{number}"
                yield Record(id, entry["image_id"], image, text, (), problem, f"{self.uri}#{number}")
