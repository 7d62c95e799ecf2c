"""Karpathy's `dataset_*.json` of COCO, Flickr8k and Flickr30k, with a folder of images."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import PAIRS, Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError

TOGETHER = Schema((Field("image", "image"), Field("captions", "captions")))


@dataclass
class Karpathy(Source):
    """One pair per caption; `image_id` is the file name. `split` may join several: "train+restval".

    With `captions` "together", one record per image, with a column `captions` in place of `text`; the id is the file
    name too. A caption that is no text then takes its image with it.

    Images are in the folder `images`, by default the one beside the JSON; those of COCO may be in the entry's
    `filepath` (`val2014/...`) below it.
    """

    format: ClassVar[str] = "karpathy"

    uri: str  # of the JSON, or of a folder with exactly one dataset_*.json
    split: str = "train"
    images: str | None = None
    captions: str = "pairs"

    def __post_init__(self) -> None:
        if self.captions not in ("pairs", "together"):
            raise UserError(f"captions={self.captions!r} is not a choice; write captions=pairs or captions=together")
        self.schema = TOGETHER if self.captions == "together" else PAIRS
        if not self.uri.endswith(".json"):
            store = open_store(self.uri)
            names = [n for n in store.list("dataset_") if n.endswith(".json") and "/" not in n]
            if len(names) != 1:
                raise UserError(f"{store.uri} holds {len(names)} files dataset_*.json; give the path of one")
            self.uri = store.address(names[0])
        store, name = open_file(self.uri)
        self.uri = store.address(name)
        try:
            self._images = open_store(self.images or store.address("images"))
        except UserError as error:
            raise UserError(f"{error}; name the image folder with images=...") from error
        data = store.read(name)
        self.listing = hashlib.sha256(data).hexdigest()
        try:
            entries = json.loads(data)["images"]
            wanted = self.split.split("+")
            present = sorted({entry["split"] for entry in entries})
            entries = [
                {
                    "image_id": entry.get("filename") or str(entry["imgid"]),
                    "paths": tuple(
                        posixpath.join(folder, entry["filename"]) for folder in (entry.get("filepath") or "", "")
                    ),
                    "captions": [(str(s["sentid"]), s.get("raw")) for s in entry["sentences"]],
                }
                for entry in entries
                if entry["split"] in wanted
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.uri} is not in Karpathy's format: {type(error).__name__} {error}") from error
        if unknown := [name for name in wanted if name not in present]:
            raise UserError(f"{self.uri} has no split {unknown[0]!r}; it has {', '.join(present)}")
        mean = mean_image_bytes(self._images, [entry["paths"] for entry in entries])
        copies = [1 if self.captions == "together" else len(entry["captions"]) for entry in entries]
        self._units = cut_units(name, ((entry, mean * n) for entry, n in zip(entries, copies, strict=True)))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (entry["paths"] for entry in unit.content))
        for entry, (image, problem) in zip(unit.content, images, strict=True):
            name = entry["image_id"]
            if self.captions == "together":
                values = {"image": image, "captions": [text for _, text in entry["captions"]]}
                yield Record(name, name, values, problem=problem, address=f"{self.uri}#{name}")
                continue
            if not entry["captions"]:
                problem = problem or "the list of captions is empty"
                yield Record(name, name, {"image": image, "text": None}, problem=problem, address=f"{self.uri}#{name}")
            for number, text in entry["captions"]:
                values = {"image": image, "text": text}
                yield Record(f"{name}#{number}", name, values, problem=problem, address=f"{self.uri}#{number}")
