"""NLVR2: JSON lines of statements about two images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.entries import json_entries, names_sides
from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError

SCHEMA = Schema(
    (
        Field("image", "image"),
        Field("image_2", "image"),
        Field("text", "text"),
        Field("label", "label", ("False", "True")),
        Field("sentence", "text"),
    )
)


@dataclass
class Nlvr2(Source):
    """One statement a record; the id is its identifier, `split-set-pair-sentence`, `image_id` that of the pair.

    `sentence` is the identifier without the pair: lines with the same one state the same of other images. Images are
    `<split>-<set>-<pair>-img0.png` (left) and `-img1.png` below the folder `images`, by default the one beside the
    JSON: all in it, or in `<split>/`, or in `<split>/<directory>/`.
    """

    format: ClassVar[str] = "nlvr2"
    schema = SCHEMA

    uri: str  # of the JSON lines
    images: str | None = None

    def __post_init__(self) -> None:
        store, name = open_file(self.uri)
        self.uri = store.address(name)
        try:
            self._images = open_store(self.images or store.address("images"))
        except UserError as error:
            raise UserError(f"{error}; name the image folder with images=...") from error
        data = store.read(name)
        self.listing = hashlib.sha256(data).hexdigest()
        lines = json_entries(data, self.uri, ("identifier", "sentence", "label"))
        entries = [self._entry(line) for line in lines]
        mean = mean_image_bytes(self._images, [entry["paths"][0] for entry in entries])
        self._units = cut_units(name, ((entry, 2 * mean) for entry in entries))

    def _entry(self, line: dict) -> dict:
        parts = str(line["identifier"]).split("-")
        if len(parts) != 4:
            raise UserError(f"{self.uri} has the identifier {line['identifier']!r}, not split-set-pair-sentence")
        split, group, pair, sentence = parts
        stem = f"{split}-{group}-{pair}"
        folders = ("", f"{split}/", *([f"{split}/{line['directory']}/"] if "directory" in line else ()))
        text = line["sentence"]  # whether it is a text is checked later
        of_an_image = re.sub(r"\b(left|right)(?=\W+(image|picture|photo))", "", str(text), flags=re.IGNORECASE)
        return {
            "id": line["identifier"],
            "image_id": stem,
            "paths": [tuple(f"{folder}{stem}-img{k}.png" for folder in folders) for k in (0, 1)],
            "values": {"text": text, "sentence": f"{split}-{group}--{sentence}"},
            "label": {"false": 0, "true": 1}.get(str(line["label"]).lower()),
            # a flip acts within an image, so "the left image" stays true
            "forbid": ("flip",) if names_sides(of_an_image) else (),
        }

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (path for entry in unit.content for path in entry["paths"]))
        for entry, left, right in zip(unit.content, images, images, strict=True):
            problem = left[1] or right[1] or ("" if entry["label"] is not None else "the label is not True or False")
            values = entry["values"] | {"image": left[0], "image_2": right[0], "label": entry["label"]}
            address = f"{self.uri}#{entry['id']}"
            yield Record(entry["id"], entry["image_id"], values, entry["forbid"], problem, address)
