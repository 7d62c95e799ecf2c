"""Segmentation: images and masks in the layout of ADE20K."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from vlmo_ray.data.decode import image_problem
from vlmo_ray.data.prepare.folders import class_lines
from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, read_images
from vlmo_ray.data.schema import IGNORED, IMAGE_FORMATS, Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError


@dataclass
class Ade20k(Source):
    """`images/<split>/**` and `annotations/<split>/**.png` of the same stem: the id is the stem, `image_id` the path.

    With `split` "" all images are taken, also where there are no folders of splits. Every file is taken as an image,
    except those whose name, or folder, begins with a dot; a mask without an image is no record.

    `classes` names the classes: a file with one a line, ADE20K's objectInfo150 (.txt or .csv), or the number of them,
    whose names are then "0", "1", .... In a stored mask, pixels are class numbers from 0, or IGNORED. `zero` says what
    a 0 in a source mask is: "ignore", no class, so that class k is stored as k - 1 (ADE20K's rule), or "class". The
    value IGNORED stays in both. Of a mask with a palette, the indices count.
    """

    format: ClassVar[str] = "ade20k"

    uri: str  # of the folder with images/ and annotations/
    split: str = "training"
    classes: str | None = None
    zero: str = "ignore"

    def __post_init__(self) -> None:
        self.store = open_store(self.uri)
        self.uri = self.store.uri
        if self.zero not in ("ignore", "class"):
            raise UserError(f"zero={self.zero!r} is not a choice; write zero=ignore or zero=class")
        if not self.classes:
            raise UserError(
                f"the masks of {self.uri} have no names of classes; give classes=FILE, with one a line or "
                "objectInfo150, or their number, for example classes=150"
            )
        if not (names := _names(self.classes)):
            raise UserError(f"classes={self.classes} names no class; write one a line, or give their number")
        self.schema = Schema((Field("image", "image"), Field("mask", "mask", names)))
        self._folder = folder = posixpath.join("images", self.split, "")
        sizes = {n: size for n, size in self.store.sizes().items() if not f"/{n}".count("/.")}
        images = [name for name in sizes if name.startswith(folder)]
        if not images:
            found = sorted({name.split("/")[1] for name in sizes if name.startswith("images/") and name.count("/") > 1})
            remedy = f"name a split by split=... ({', '.join(found)})" if found else "write split= without a name"
            raise UserError(f"{self.store.address(folder)} holds no files; {remedy}")
        pairs = [(name, _mask_of(name)) for name in images]
        used = {name: sizes[name] for pair in pairs for name in pair if name in sizes}
        self.versions = json.dumps({name: v for name, v in self.store.versions().items() if name in used})
        self.listing = hashlib.sha256(json.dumps([used, names]).encode()).hexdigest()
        self._units = cut_units("images", ((pair, sum(used.get(name, 0) for name in pair)) for pair in pairs))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        files = read_images(self.store, (name for pair in unit.content for name in pair))
        num_classes = len(self.schema.field("mask").values)
        for (name, _), (image, problem), (mask, missing) in zip(unit.content, files, files, strict=True):
            if not problem and missing:
                problem = "the mask file is missing"
            if image and mask:
                mask, problem = stored_mask(image, mask, num_classes, self.zero == "ignore")
            id = posixpath.splitext(name.removeprefix(self._folder))[0]
            yield Record(id, name, {"image": image, "mask": mask}, problem=problem, address=self.store.address(name))


def stored_mask(image: bytes, mask: bytes, num_classes: int, ignore_zero: bool) -> tuple[bytes | None, str]:
    """(the mask as a PNG of class numbers from 0 and IGNORED, ""), or (None, why it cannot be the image's)."""
    if problem := image_problem(image, verify=False) or image_problem(mask, verify=True, is_mask=True):
        return None, problem
    picture, drawn = (Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) for data in (image, mask))
    if picture.size != drawn.size:
        return None, "the image and its mask differ in size"
    given, shift = np.asarray(drawn).astype(np.int32), int(ignore_zero)
    ignored = (given == IGNORED) | (given < shift)
    number = np.where(ignored, IGNORED, given - shift)
    if (~ignored & (number >= num_classes)).any():
        return None, "the mask has a value that is no class"
    file = io.BytesIO()
    Image.fromarray(number.astype(np.uint8)).save(file, "PNG")
    return file.getvalue(), ""


def _mask_of(image: str) -> str:
    return posixpath.splitext(image.replace("images/", "annotations/", 1))[0] + ".png"


def _names(classes: str) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    if classes.isdecimal():
        return tuple(map(str, range(int(classes))))
    lines = class_lines(classes)
    for delimiter in "\t,":
        table = csv.DictReader(lines, delimiter=delimiter)
        if {"Idx", "Name"} <= set(table.fieldnames or ()):
            names = [row["Name"] for row in table]
            if None in names:
                short = lines[1 + names.index(None)]
                raise UserError(f"{classes} has a line without a Name: {short!r:.80}; complete it, or remove it")
            return tuple(name.strip() for name in names)
    return tuple(lines)
