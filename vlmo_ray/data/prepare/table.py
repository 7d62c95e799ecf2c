"""A CSV or TSV table of image paths and captions."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import logging
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
_DELIMITERS = ("\t", ",", ";", "|")
_HEAD_BYTES = 1 << 16  # in which the delimiter is found
_UTF = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PK\x03\x04")
logger = logging.getLogger(__name__)


class _Lines:
    """The lines of a binary file as text; `offset` is the first byte after the lines so far.

    csv.reader asks for one line at a time, so after each row `offset` is where the next row begins, even if there are
    line breaks inside quotes. A byte order mark at the beginning of the file is left out, and a carriage return that
    ends no line becomes a space.
    """

    def __init__(self, lines: Iterator[bytes], offset: int = 0) -> None:
        self._lines, self.offset, self.digest = lines, offset, hashlib.sha256()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, at_start = next(self._lines), self.offset == 0
        self.offset += len(line)
        self.digest.update(line)
        line = line.removeprefix(codecs.BOM_UTF8) if at_start else line
        text = line.decode("utf-8", "surrogateescape").replace("\0", "\N{REPLACEMENT CHARACTER}")
        return re.sub(r"\r(?!\n|\Z)", " ", text) if "\r" in text else text


@dataclass
class Table(Source):
    """One pair per row; `image_id` is the path, the id `<table>:<row>`, counted from 0 after the header.

    Columns are named, or numbered from 0 if the table has no header (`header=False`). Paths are relative to `images`,
    by default the table's folder; absolute ones must lie below it. A tab, comma, semicolon or pipe separates columns:
    `delimiter`, by default the first of them in the header, or in a table without one the first that all rows have.
    With `quoting`, by default unless tabs separate columns, a cell in quotation marks may have delimiters and line
    breaks in it; a quotation mark without a partner is a UserError. A row with more cells than the header, or without
    one than the first row, is left out: its caption has a delimiter without quotation marks.
    """

    format: ClassVar[str] = "table"

    uri: str
    image_column: str | int | None = None
    text_column: str | int | None = None
    header: bool = True
    quoting: bool | None = None
    delimiter: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        self._store, self._name = open_file(self.uri)
        self.uri = self._store.address(self._name)
        self._images = open_store(self.images or self._store.uri)
        self._dialect = self._dialect_of(self._store.read(self._name, 0, _HEAD_BYTES))
        self._units = self._scan()

    def _dialect_of(self, head: bytes) -> dict[str, Any]:
        """The arguments of `csv.reader`, from what was given and the first bytes of the table."""
        if not head.strip():
            raise UserError(f"{self.uri} is empty")
        if head.startswith(_PACKED):
            raise UserError(f"{self.uri} is compressed; unpack it")
        encoding = next((name for name, marks in _UTF.items() if head.startswith(marks)), "")
        if encoding := encoding or ("UTF-16" if head.count(0) * 4 > len(head) else ""):
            raise UserError(f"{self.uri} is {encoding}; convert it: iconv -f {encoding} -t UTF-8 {self._name} > NEW")
        if b"\n" not in head and head.count(b"\r") > 1:
            convert = f"tr '\\r' '\\n' < {self._name} > NEW"
            raise UserError(f"the lines of {self.uri} end in carriage returns alone; convert it: {convert}")
        if self.delimiter is not None:
            delimiter = {"\\t": "\t", "tab": "\t"}.get(self.delimiter, self.delimiter)
            if delimiter not in _DELIMITERS:
                raise UserError(f"delimiter={self.delimiter!r} is none of tab, ',', ';' and '|'")
            return self._reading(delimiter)
        whole = len(head) < _HEAD_BYTES
        lines = [line for line in head.splitlines(keepends=True) if line.strip()]
        lines = lines if whole or len(lines) == 1 else lines[:-1]
        found = {}  # the length of the first cell, by delimiter
        for delimiter in _DELIMITERS:
            try:
                loose: dict[str, Any] = self._reading(delimiter) | {"strict": False}
                reader = csv.reader(_Lines(iter(lines)), **loose)
                rows = list(itertools.islice(reader, 1 if self.header else 20))
            except csv.Error:  # `_scan` reports it, with its row
                continue
            if rows and all(len(row) > 1 for row in rows):
                found[delimiter] = len(rows[0][0])
        default = "\t" if self._name.lower().endswith((".tsv", ".txt")) else ","
        return self._reading(min(found, key=found.__getitem__) if found else default)

    def _reading(self, delimiter: str) -> dict[str, Any]:
        quoting = delimiter != "\t" if self.quoting is None else self.quoting
        return {
            "delimiter": delimiter,
            "quoting": csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
            "skipinitialspace": quoting,  # a, "b, c"
            "strict": True,  # text after a closing quotation mark, or none to the end, shows one without a partner
        }

    def _scan(self) -> list[WorkUnit]:
        """Read the table once, to cut it between rows and for `listing`; sets the column numbers."""
        starts, first, paths = array("q"), [], []  # the offset of each row, the header, the first image paths
        spanning = array("q")  # rows of several lines
        with io.BufferedReader(self._store.open_stream(self._name)) as file:
            lines = _Lines(iter(file))
            reader = csv.reader(lines, **self._dialect)
            try:
                if self.header:
                    first = next(reader, [])
                self._image = self._column("image", self.image_column, first, _IMAGE_COLUMNS, 0)
                self._text = self._column("text", self.text_column, first, _TEXT_COLUMNS, 1)
                if self._image == self._text:
                    raise UserError(f"{self.uri}: column {self._image} cannot be both the image and the text")
                self._width = len(first)
                start, line = lines.offset, reader.line_num
                for row in reader:
                    if reader.line_num > line + 1:
                        spanning.append(len(starts))
                    starts.append(start)
                    self._width = self._width or len(row)
                    start, line = lines.offset, reader.line_num
                    if len(row) > self._image and len(paths) < _SIZED_ROWS:
                        paths.append(row[self._image])
            except csv.Error as error:
                raise UserError(
                    f"{self.uri}, after row {len(starts)}: {error}; if a quotation mark in a caption has no "
                    "partner, use quoting=False"
                ) from error
        if spanning:
            logger.warning(
                f"{self.uri}: {len(spanning)} rows have a line break inside quotation marks, the first is row "
                f"{spanning[0]}; if these are several rows each, use quoting=False"
            )
        self.listing, num_rows = lines.digest.hexdigest(), len(starts)
        if not num_rows:
            raise UserError(f"{self.uri} has no rows below its header" if first else f"{self.uri} has no rows")
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
        rows = list(csv.reader(_Lines(iter(io.BytesIO(data)), start), **self._dialect))
        need = max(self._image, self._text)
        images = read_images(self._images, (row[self._image] if len(row) > need else "." for row in rows))
        for number, (row, (image, problem)) in enumerate(zip(rows, images, strict=True), first_row):
            if not row:
                continue  # an empty line
            path, text = (row[self._image], row[self._text]) if len(row) > need else ("-", None)
            problem = problem if len(row) > need else "the row has too few columns"
            if any(row[self._width :]):
                problem = "the row has too many columns; a caption with the delimiter in it needs quotation marks"
            if text is not None and not is_unicode(text):
                problem = "the caption is not UTF-8"
            id, values = f"{self._name}:{number}", {"image": image, "text": text}
            yield Record(id, path, values, problem=problem, address=f"{self.uri}:{number}")
