"""A CSV or TSV table of image paths and captions."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.source import (
    UNIT_BYTES,
    Source,
    WorkUnit,
    mean_image_bytes,
    open_file,
    pick_column,
    read_images,
)
from vlmo_ray.data.schema import Record, is_unicode
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError

_IMAGE_COLUMNS = ("filepath", "path", "image", "image_path", "filename", "file_name", "file")
_TEXT_COLUMNS = ("caption", "text", "title", "sentence")
_SIZED_ROWS = 4096


class _Lines:
    """The lines of a binary file as text; `offset` is the first byte after the lines so far.

    csv.reader asks for one line at a time, so after each row `offset` is where the next row begins, even if there are
    line breaks inside quotes.
    """

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines, self.offset, self.digest = lines, 0, hashlib.sha256()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line)
        self.digest.update(line)
        return line.decode("utf-8", "surrogateescape").replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass
class Table(Source):
    """One pair per row; `image_id` is the path, the id `<table>:<row>`, counted from 0 after the header.

    Columns are named, or numbered from 0 if the table has no header (`header=False`). Paths are relative to `images`,
    by default the table's folder; absolute ones must lie below it. `quoting=False` gives quotation marks no meaning.
    Tabs separate columns in `.tsv` and `.txt` tables, commas in others.
    """

    format: ClassVar[str] = "table"

    uri: str
    image_column: str | int | None = None
    text_column: str | int | None = None
    header: bool = True
    quoting: bool = True
    images: str | None = None

    def __post_init__(self) -> None:
        self._store, self._name = open_file(self.uri)
        self.uri = self._store.address(self._name)
        self._images = open_store(self.images or self._store.uri)
        self._dialect = {
            "delimiter": "\t" if self._name.endswith((".tsv", ".txt")) else ",",
            "quoting": csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
        }
        self._units = self._scan()

    def _scan(self) -> list[WorkUnit]:
        """Read the table once, to cut it between rows and for `listing`; sets the column numbers."""
        starts, first, paths = array("q"), [], []  # the offset of each row, the header, the first image paths
        with io.BufferedReader(self._store.open_stream(self._name)) as file:
            lines = _Lines(iter(file))
            reader = csv.reader(lines, **self._dialect)
            try:
                if self.header:
                    first = [name.removeprefix("\ufeff") for name in next(reader, [])]
                self._image = self._column("image", self.image_column, first, _IMAGE_COLUMNS, 0)
                self._text = self._column("text", self.text_column, first, _TEXT_COLUMNS, 1)
                start = lines.offset
                for row in reader:
                    starts.append(start)
                    start = lines.offset
                    if len(row) > self._image and len(paths) < _SIZED_ROWS:
                        paths.append(row[self._image].removeprefix("\ufeff"))
            except csv.Error as error:
                raise UserError(
                    f"{self.uri}, after row {len(starts)}: {error}; if a quotation mark in a caption has no "
                    "partner, use quoting=False"
                ) from error
        self.listing, num_rows = lines.digest.hexdigest(), len(starts)
        mean = mean_image_bytes(self._images, paths)
        cuts = [*range(0, num_rows, max(1, UNIT_BYTES // mean)), num_rows]
        starts.append(lines.offset)
        return [
            WorkUnit(f"{self._name} rows {row} to {last}", (last - row) * mean, (starts[row], starts[last], row))
            for row, last in itertools.pairwise(cuts)
        ]

    def _column(
        self, field: str, chosen: str | int | None, header: list[str], known: tuple[str, ...], default: int
    ) -> int:
        """The number of the column for a field."""
        chosen = None if chosen is None else str(chosen)
        if not self.header:
            chosen = chosen or str(default)
            if not chosen.isdigit():
                raise UserError(f"{self.uri} has no header, so {field}_column={chosen!r} must be a number")
            return int(chosen)
        if chosen and chosen not in header and chosen.isdigit() and int(chosen) < len(header):
            return int(chosen)
        remedy = f"{field}_column=..., or say header=False"
        return header.index(pick_column(self.uri, header, field, known, chosen, remedy))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        start, stop, first_row = unit.content
        data = self._store.read(self._name, start, stop - start)
        rows = list(csv.reader(_Lines(iter(io.BytesIO(data))), **self._dialect))
        if first_row == 0 and rows and rows[0]:
            rows[0][0] = rows[0][0].removeprefix("\ufeff")
        need = max(self._image, self._text)
        images = read_images(self._images, (row[self._image] if len(row) > need else "." for row in rows))
        for number, (row, (image, problem)) in enumerate(zip(rows, images, strict=True), first_row):
            if not row:
                continue  # an empty line
            path, text = (row[self._image], row[self._text]) if len(row) > need else ("-", None)
            problem = problem if len(row) > need else "the row has too few columns"
            if text is not None and not is_unicode(text):
                problem = "the caption is not UTF-8"
            id, values = f"{self._name}:{number}", {"image": image, "text": text}
            yield Record(id, path, values, problem=problem, address=f"{self.uri}:{number}")
