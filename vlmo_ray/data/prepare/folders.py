"""Images in one folder per class, as ImageNet is unpacked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.source import Source, WorkUnit, cut_units, open_file, read_images
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError


@dataclass
class Folders(Source):
    """`<class>/.../x.jpg`: the label is the index of the class in the sorted folder names; the ids are the path.

    `classes` is a file with one class a line, which fixes their order; a folder that it does not name is an error.
    Without it, an empty folder is not a class, because object storage has no empty folders. Every file is taken as an
    image, except files and folders whose name begins with a dot. With `labels` false, the images are the records,
    wherever they lie.
    """

    format: ClassVar[str] = "folders"

    uri: str
    classes: str | None = None
    labels: bool = True

    def __post_init__(self) -> None:
        self.store = open_store(self.uri)
        self.uri = self.store.uri
        sizes = {n: size for n, size in self.store.sizes().items() if not f"/{n}".count("/.")}
        found = sorted({name.partition("/")[0] for name in sizes if "/" in name}) if self.labels else []
        if self.classes and not self.labels:
            raise UserError(f"classes={self.classes!r} says nothing with labels=False; leave out one of them")
        classes = class_lines(self.classes) if self.classes else found
        if unlisted := [name for name in found if name not in set(classes)]:
            raise UserError(f"{self.store.address(unlisted[0])} is not a class in {self.classes}; add a line")
        if not sizes or (self.labels and not found):
            raise UserError(f"{self.uri} holds no folder with files; give a folder that has one for each class")
        label = (Field("label", "label", tuple(classes)),) if self.labels else ()
        self.schema = Schema((Field("image", "image"), *label))
        self.versions = json.dumps({name: v for name, v in self.store.versions().items() if name in sizes})
        self.listing = hashlib.sha256(json.dumps([sizes, classes]).encode()).hexdigest()
        number = {name: label for label, name in enumerate(classes)}
        self._units = cut_units("images", (((n, number.get(n.partition("/")[0])), size) for n, size in sizes.items()))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        images = read_images(self.store, (name for name, _ in unit.content))
        for (name, label), (image, problem) in zip(unit.content, images, strict=True):
            values = {"image": image} | ({"label": label} if self.labels else {})
            if self.labels and label is None:
                problem = "the file lies in no folder of a class"
            yield Record(name, name, values, problem=problem, address=self.store.address(name))


def class_lines(uri: str) -> list[str]:
    """The lines of a file with one class a line, without blank ones."""
    store, name = open_file(uri)
    try:
        lines = store.read(name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{store.address(name)} is not UTF-8: {error}; write one class a line") from error
    return [line.strip() for line in lines if line.strip()]
