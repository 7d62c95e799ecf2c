"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that each refer to one box in an image of COCO."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmo_ray.data.prepare.entries import json_entries, names_sides
from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError


@dataclass
class RefCoco(Source):
    """One expression a record; the id is its `sent_id`, `image_id` the file name of the image.

    `uri` is a folder with `refs(<by>).p` and `instances.json`, as https://github.com/lichengunc/refer gives them.
    `split` may join several: "testA+testB". `by` says who has cut the splits: unc, umd or google; it may be left out
    where there is one file. Images are in the folder `images`, by default `train2014` beside `uri`.

    The text is the expression in lower case and without punctuation (`sent`); ALBEF brings every text into that form
    before it trains on it. `boxes` holds the one box that it refers to. `dets` is a JSON object of detected boxes
    `[x, y, width, height, ...]` by the number of the image, as ALBEF has those of MAttNet; they become `proposals`. An
    image that is not in it, or whose boxes are all empty, has none.
    """

    format: ClassVar[str] = "refcoco"

    uri: str
    split: str = "train"
    by: str | None = None
    images: str | None = None
    dets: str | None = None

    def __post_init__(self) -> None:
        store = open_store(self.uri)
        self.uri = store.uri
        try:
            self._images = open_store(self.images or f"{store.address('').rpartition('/')[0]}/train2014")
        except UserError as error:
            raise UserError(f"{error}; name the image folder with images=...") from error
        by = {found[1]: name for name in store.list() if (found := re.fullmatch(r"refs\((\w+)\)\.p", name))}
        chosen = self.by or (next(iter(by)) if len(by) == 1 else "")
        if chosen not in by:
            found = f"choose from {', '.join(sorted(by))} by by=..." if by else "it holds no refs(...).p"
            raise UserError(f"{self.uri}: by={self.by} names no file of refs; {found}")
        if not store.exists("instances.json"):
            raise UserError(f"{store.address('instances.json')} does not exist; it comes with the refs")
        pickled, data = store.read(by[chosen]), store.read("instances.json")
        digest = hashlib.sha256(pickled)
        digest.update(data)
        refs, address = plain_refs(pickled, store.address(by[chosen])), store.address("instances.json")
        present, wanted = sorted({str(ref["split"]) for ref in refs}), self.split.split("+")
        if unknown := [name for name in wanted if name not in present]:
            raise UserError(f"{store.address(by[chosen])} has no split {unknown[0]!r}; it has {', '.join(present)}")
        files = {each["id"]: each["file_name"] for each in json_entries(data, address, ("id", "file_name"), "images")}
        annotations = json_entries(data, address, ("id", "bbox"), "annotations")
        boxes = {each["id"]: [corners(each["bbox"], address)] for each in annotations}
        detected = _detected(self.dets, digest) if self.dets else {}
        columns = (Field("image", "image"), Field("text", "text"), Field("boxes", "boxes"))
        self.schema = Schema((*columns, Field("proposals", "boxes")) if self.dets else columns)
        entries = [
            {
                "path": files.get(ref["image_id"], ""),
                "expressions": [(str(each["sent_id"]), each["sent"]) for each in ref["sentences"]],
                "boxes": {"boxes": boxes.get(ref["ann_id"])}
                | ({"proposals": detected.get(str(ref["image_id"]), [])} if self.dets else {}),
            }
            for ref in refs
            if ref["split"] in wanted
        ]
        if self.dets and not any(each["boxes"]["proposals"] for each in entries):
            raise UserError(f"{self.dets} has a box in none of the images of {self.split}; is it of another data set?")
        self.listing = digest.hexdigest()
        mean = mean_image_bytes(self._images, [entry["path"] for entry in entries])
        self._units = cut_units(self.split, ((entry, mean * len(entry["expressions"])) for entry in entries))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self._images, (entry["path"] for entry in unit.content))
        for entry, (image, problem) in zip(unit.content, images, strict=True):
            for id, text in entry["expressions"]:
                forbid = ("flip",) if names_sides(str(text)) else ()
                values = {"image": image, "text": text} | entry["boxes"]
                yield Record(id, entry["path"], values, forbid, problem, f"{self.uri}#{id}")


def corners(box: Any, address: str) -> list[float]:
    """[x, y, width, height, ...] -> [x0, y0, x1, y1]; UserError that names the file at `address` for anything else."""
    try:
        x, y, width, height = map(float, box[:4])
    except (TypeError, ValueError) as error:
        raise UserError(f"{address} has a box that is not x, y, width and height: {box!r:.80}") from error
    return [x, y, x + width, y + height]


def _detected(uri: str, digest) -> dict[str, list[list[float]]]:
    """The detected boxes [x0, y0, x1, y1], by the number of the image."""
    store, name = open_file(uri)
    data, address = store.read(name), store.address(name)
    digest.update(data)
    try:
        found = json.loads(data)
        if not (isinstance(found, dict) and all(isinstance(boxes, list) for boxes in found.values())):
            raise ValueError("it is no object with a list of boxes for each image")
    except ValueError as error:
        raise UserError(f"{address} does not hold detected boxes: {error}") from error
    corner = {image: [corners(box, address) for box in boxes] for image, boxes in found.items()}
    return {image: [box for box in boxes if box[0] < box[2] and box[1] < box[3]] for image, boxes in corner.items()}


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle from the net could else run any program."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it asks for {module}.{name}, and a list of refs needs no such thing; do not trust this file")


def plain_refs(data: bytes, address: str) -> list[dict]:
    """The refs of a pickle that Python 2 or 3 has written; UserError if it asks for anything else than plain values,
    or has another form."""
    try:
        refs = _Plain(io.BytesIO(data), encoding="latin1").load()
        for ref in refs:
            if missing := [name for name in ("image_id", "ann_id", "split", "sentences") if name not in ref]:
                raise ValueError(f"a ref has no {missing[0]!r}")
            if any("sent_id" not in each or "sent" not in each for each in ref["sentences"]):
                raise ValueError("a sentence has no 'sent_id' or no 'sent'")
    except Exception as error:  # damaged pickles raise errors of many types
        raise UserError(f"{address} is not a list of refs: {error}") from error
    return refs
