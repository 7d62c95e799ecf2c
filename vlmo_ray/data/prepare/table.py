"""A CSV or TSV table of image paths and captions."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
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
_LOOKED_AT = 64  # lines, to find the delimiter
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


class _Lines:
    """The lines of a binary file as text, without a byte order mark; `offset` is the first byte after the lines so far.

    csv.reader asks for one line at a time, so after each row `offset` is where the next row begins, even if there are
    line breaks inside quotes.
    """

    def __init__(self, lines: Iterator[bytes], offset: int = 0) -> None:
        self._lines, self.offset, self.digest = lines, offset, hashlib.sha256()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        at_start = self.offset == 0
        self.offset += len(line)
        self.digest.update(line)
        line = line.removeprefix(codecs.BOM_UTF8) if at_start else line
        return line.decode("utf-8", "surrogateescape").replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass
class Table(Source):
    """One pair per row; `image_id` is the path, the id `<table>:<row>`, counted from 0 after the header.

    Columns are named, or numbered from 0 if the table has no header (`header=false`). Paths are relative to `images`,
    by default the table's folder; absolute ones must lie below it. `delimiter` is one of tab, comma, semicolon and
    pipe, by default the one that cuts the first lines into equally many columns. Quotation marks have a meaning
    (`quoting`) unless the delimiter is the tab; one without a partner is an error, since it would swallow rows.
    """

    format: ClassVar[str] = "table"

    uri: str
    image_column: str | None = None
    text_column: str | None = None
    header: bool = True
    quoting: bool | None = None
    images: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        self._store, self._name = open_file(self.uri)
        self.uri = self._store.address(self._name)
        self._images = open_store(self.images or self._store.uri)
        self._dialect = self._find_dialect()
        self._units = self._scan()

    def _find_dialect(self) -> dict[str, Any]:
        with io.BufferedReader(self._store.open_stream(self._name)) as file:
            first = list(itertools.islice(file, _LOOKED_AT))
        if first and first[0].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{self.uri} is UTF-16; write it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`")
        if self.delimiter is not None and self.delimiter not in _DELIMITERS:
            raise UserError(f"delimiter={self.delimiter!r} must be one of {', '.join(_DELIMITERS)}")
        usual = "\t" if self._name.lower().endswith((".tsv", ".txt")) else ","

        def dialect(delimiter: str) -> dict[str, Any]:
            quoting = delimiter != "\t" if self.quoting is None else self.quoting
            kind = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
            # strict: text after a closing mark, or the end of the table inside of marks, is an error
            return {"delimiter": delimiter, "quoting": kind, "strict": quoting}

        def fit(delimiter: str) -> tuple[float, bool, int]:
            """The share of rows with as many columns as the first, whether it is the usual one, the columns."""
            options = dialect(delimiter) | {"strict": False}
            counts = [len(row) for row in csv.reader(_Lines(iter(first)), **options) if row]
            equal = counts.count(counts[0]) / len(counts) if counts and counts[0] > 1 else 0.0
            return equal, delimiter == usual, counts[0] if counts else 0

        chosen = _DELIMITERS[self.delimiter] if self.delimiter else max(_DELIMITERS.values(), key=fit)
        return dialect(chosen)

    def _scan(self) -> list[WorkUnit]:
        """Read the table once, to cut it between rows and for `listing`; sets the column numbers."""
        starts, first, paths = array("q"), [], []  # the offset of each row, the header, the first image paths
        broken: list[int] = []  # rows with a line break in a quoted cell
        with io.BufferedReader(self._store.open_stream(self._name)) as file:
            lines = _Lines(iter(file))
            reader = csv.reader(lines, **self._dialect)
            try:
                if self.header:
                    first = next(reader, [])
                self._image = self._column("image", self.image_column, first, _IMAGE_COLUMNS, 0)
                self._text = self._column("text", self.text_column, first, _TEXT_COLUMNS, 1)
                start = lines.offset
                for row in reader:
                    if any("\n" in cell for cell in row):
                        broken.append(len(starts))
                    starts.append(start)
                    start = lines.offset
                    if len(row) > self._image and len(paths) < _SIZED_ROWS:
                        paths.append(row[self._image])
            except csv.Error as error:
                raise UserError(
                    f"{self.uri}, after row {len(starts)}: {error}. A quotation mark has no partner, or stands in the "
                    "middle of a cell: give quotation marks no meaning by quoting=false, or double it"
                ) from error
        if broken:
            print(
                f"{self.uri}: {len(broken):,} rows have a line break in a quoted cell, the first is row {broken[0]}; if "
                "its quotation mark has no partner, rows are lost in it: use quoting=false",
                flush=True,
            )
        self.listing, num_rows = lines.digest.hexdigest(), len(starts)
        mean = mean_image_bytes(self._images, paths)
        cuts = [*range(0, num_rows, max(1, UNIT_BYTES // mean)), num_rows]
        starts.append(lines.offset)
        return [
            WorkUnit(f"{self._name} rows {row} to {last}", (last - row) * mean, (starts[row], starts[last], row))
            for row, last in itertools.pairwise(cuts)
        ]

    def _column(self, field: str, chosen: str | None, header: list[str], known: tuple[str, ...], default: int) -> int:
        """The number of the column for a field."""
        if not self.header:
            chosen = chosen or str(default)
            if not chosen.isdigit():
                raise UserError(f"{self.uri} has no header, so {field}_column={chosen!r} must be a number")
            return int(chosen)
        if chosen and chosen not in header and chosen.isdigit() and int(chosen) < len(header):
            return int(chosen)
        remedy = f"{field}_column=..., or say header=false"
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
            if text is not None and not is_unicode(text):
                problem = "the caption is not UTF-8"
            id, values = f"{self._name}:{number}", {"image": image, "text": text}
            yield Record(id, path, values, problem=problem, address=f"{self.uri}:{number}")
