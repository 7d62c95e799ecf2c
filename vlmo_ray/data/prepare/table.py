"""A CSV or TSV table of image paths and captions."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlmo_ray.data.prepare.source import UNIT_BYTES, WorkUnit, mean_image_bytes, open_file, read_images
from vlmo_ray.data.schema import PAIRS, Record, Schema
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError

_IMAGE_COLUMNS = ("filepath", "path", "image", "image_path", "filename", "file_name", "file")
_TEXT_COLUMNS = ("caption", "text", "title", "sentence")
_SAMPLE_ROWS = 4096


class _Lines:
    """The lines of a binary file as text; `offset` is the first byte that has not been handed out.

    csv.reader asks for one line at a time, so after each row `offset` is where the next begins, whatever line
    breaks there are inside quotes.
    """

    def __init__(self, lines: Iterator[bytes], offset: int = 0) -> None:
        self._lines, self.offset, self.digest = lines, offset, hashlib.sha256()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line)
        self.digest.update(line)
        return line.decode("utf-8", "surrogateescape").replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass
class Table:
    """One pair per row; `image_id` is the path, the id `<table>:<row>`, counted from 0 after the header.

    Columns are named, or numbered from 0 where the table has no header (`header=False`). Paths are relative
    to `images`, by default the table's folder; absolute ones must lie below it. `quoting=False` takes
    quotation marks as they are. Tabs separate columns in `.tsv` and `.txt` tables, commas in others.
    """

    format: ClassVar[str] = "table"
    schema: ClassVar[Schema] = PAIRS

    uri: str
    image_column: str | int | None = None
    text_column: str | int | None = None
    header: bool = True
    quoting: bool = True
    images: str | None = None

    def __post_init__(self) -> None:
        self._store, self._name = open_file(self.uri)
        self.uri = self._store.address(self._name)
        self._images: Store = open_store(self.images or self._store.uri)
        self._dialect = {
            "delimiter": "\t" if self._name.endswith((".tsv", ".txt")) else ",",
            "quoting": csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
        }
        self._units = self._scan()

    def _scan(self) -> list[WorkUnit]:
        """Read the table once, to cut it between rows and to fingerprint it; sets the column numbers."""
        starts, first, rows, sample = [], [], 0, []
        with io.BufferedReader(self._store.open_stream(self._name)) as file:
            lines = _Lines(iter(file))
            reader = csv.reader(lines, **self._dialect)
            try:
                if self.header:
                    first = [name.removeprefix("\ufeff") for name in next(reader, [])]
                self._image = self._column(self.image_column, first, _IMAGE_COLUMNS, 0, "image")
                self._text = self._column(self.text_column, first, _TEXT_COLUMNS, 1, "text")
                every = 0
                while True:
                    start = lines.offset
                    row = next(reader, None)
                    if every == 0 and row and len(sample) < _SAMPLE_ROWS and len(row) > self._image:
                        sample.append(row[self._image].removeprefix("\ufeff"))
                    if every == 0 and (row is None or len(sample) == _SAMPLE_ROWS):
                        # The first rows tell how large images are, and so how many rows a task gets.
                        self._mean = mean_image_bytes(self._images, sample)
                        every = max(1, UNIT_BYTES // self._mean)
                        starts = [s for i, s in enumerate(starts) if i % every == 0]
                    if row is None:
                        break
                    if every == 0 or rows % every == 0:
                        starts.append((start, rows))
                    rows += 1
            except csv.Error as error:
                raise UserError(
                    f"{self.uri}, after row {rows}: {error}; if a quotation mark in a caption has no "
                    "partner, use quoting=False"
                ) from error
            self.listing, end = lines.digest.hexdigest(), lines.offset
        ends = [*starts[1:], (end, rows)]
        return [
            WorkUnit(f"{self._name} rows {row} to {last}", (last - row) * self._mean, (start, stop, row))
            for (start, row), (stop, last) in zip(starts, ends, strict=True)
        ]

    def _column(self, chosen, header: list[str], known: tuple[str, ...], default: int, what: str) -> int:
        if not self.header:
            chosen = default if chosen is None else chosen
            if not str(chosen).isdigit():
                raise UserError(f"{self.uri} has no header, so {what}_column={chosen!r} must be a number")
            return int(chosen)
        name = chosen if chosen is not None else next((n for n in known if n in header), None)
        if name in header:
            return header.index(name)
        if str(name).isdigit() and int(name) < len(header):
            return int(name)
        raise UserError(
            f"{self.uri} has no {what} column {chosen if chosen is not None else ' or '.join(known)}; it has "
            f"{', '.join(header)}; name it with {what}_column=..., or say header=False"
        )

    def units(self) -> list[WorkUnit]:
        return self._units

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_units": []}

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
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                problem = "the caption is not UTF-8"
            at = f"{self._name}:{number}"
            values = {"image": image, "text": text}
            yield Record(at, path, values, problem=problem, address=f"{self.uri}:{number}")
