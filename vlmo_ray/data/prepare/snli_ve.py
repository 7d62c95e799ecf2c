"""SNLI-VE: the official JSON lines, or ALBEF's JSON lists, with the images of Flickr30k."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.entries import json_entries, names_sides
from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError

NAMES = ("contradiction", "neutral", "entailment")


@dataclass
class SnliVe(Source):
    """One sentence a record; the id is its `pairID`, or its number in a list. Images are `<id>.jpg` in `images`.

    Only the sentence about the image is used (`sentence2`); with the caption, `sentence1`, it would be another task.
    """

    format: ClassVar[str] = "snli_ve"
    schema = Schema((Field("image", "image"), Field("text", "text"), Field("label", "label", NAMES)))

    uri: str  # of the JSON lines or the JSON list
    images: str | None = None

    def __post_init__(self) -> None:
        store, name = open_file(self.uri)
        self.uri = store.address(name)
        try:
            self._images = open_store(self.images or store.address("flickr30k-images"))
        except UserError as error:
            raise UserError(f"{error}; name the image folder with images=...") from error
        data = store.read(name)
        self.listing = hashlib.sha256(data).hexdigest()
        albef = data.lstrip()[:1] == b"["
        names = ("image", "sentence", "label") if albef else ("Flickr30K_ID", "sentence2", "gold_label")
        entries = [
            (str(line.get("pairID", k)), *(line[name] for name in names))
            for k, line in enumerate(json_entries(data, self.uri, names))
        ]
        entries = [(id, f"{str(image).removesuffix('.jpg')}.jpg", text, label) for id, image, text, label in entries]
        mean = mean_image_bytes(self._images, [path for _, path, _, _ in entries])
        self._units = cut_units(name, ((entry, mean) for entry in entries))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (path for _, path, _, _ in unit.content))
        for (id, path, text, label), (image, problem) in zip(unit.content, images, strict=True):
            number = NAMES.index(label) if label in NAMES else None
            problem = problem or ("" if number is not None else f"the label is none of {', '.join(NAMES)}")
            forbid = ("flip",) if names_sides(str(text)) else ()
            values = {"image": image, "text": text, "label": number}
            yield Record(id, path, values, forbid, problem, f"{self.uri}#{id}")
