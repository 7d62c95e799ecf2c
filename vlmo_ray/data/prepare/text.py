"""Texts without images: plain text, JSON lines or Parquet, packed into sequences of equal length."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo_ray.data.encoders.pairs import tokenizer
from vlmo_ray.data.prepare.source import UNIT_BYTES, Source, WorkUnit, find, versions_of
from vlmo_ray.data.schema import Field, Record, Schema, problem_of_text
from vlmo_ray.errors import UserError

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
_DOCUMENTS = ("lines", "paragraphs", "files")


@dataclass
class Text(Source):
    """Documents, cut and joined to records of `length` tokens with [CLS] and [SEP]; the last of a unit is shorter.

    `uri` is a file or a folder of `.txt` and `.jsonl`, also as `.gz`, and `.parquet`. A document of plain text is a
    line, a paragraph (up to an empty line) or a file, as `documents` says; of the others a row, in which `column` has
    the text. Cuts are between words, so the tokens of the records are those of the documents. The next document begins
    on a new line. A document that is no text is a record with a problem.
    """

    format: ClassVar[str] = "text"

    uri: str
    column: str = "text"
    documents: str = "lines"
    length: int = 196  # of the released text stage

    def __post_init__(self) -> None:
        if self.documents not in _DOCUMENTS:
            raise UserError(f"documents={self.documents!r} is none of {', '.join(_DOCUMENTS)}")
        if self.length < 3:
            raise UserError(f"length={self.length} leaves no room between [CLS] and [SEP]; use at least 3")
        self._store, self.uri, sizes = find(self.uri, _SUFFIXES)
        if not sum(sizes.values()):
            raise UserError(f"{self.uri} holds no texts ({', '.join(_SUFFIXES)})")
        self.schema = Schema((Field("text", "text"),))
        self.listing = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        self.versions = versions_of(self._store, sizes)
        self._units = [unit for name, size in sizes.items() for unit in self._cut(name, size)]

    def _cut(self, name: str, size: int) -> Iterator[WorkUnit]:
        """Parts of a file of lines; of the others, the whole."""
        kind = name.lower()
        lines = kind.endswith(".jsonl") or (kind.endswith(".txt") and self.documents == "lines")
        for start in range(0, size, UNIT_BYTES if lines else max(1, size)):
            stop = min(start + UNIT_BYTES, size) if lines else size
            expected = (stop - start) * (4 if kind.endswith((".gz", ".parquet")) else 1)
            yield WorkUnit(f"{name} from byte {start}", expected, (name, start, stop))

    def records(self, unit: WorkUnit) -> Iterator[Record]:
        name, start, stop = unit.content
        address, numbers = f"{self._store.address(name)}:{start}", itertools.count()

        def record(text: str | None, problem: str = "") -> Record:
            return Record(f"{name}:{start}#{next(numbers)}", "", {"text": text}, problem=problem, address=address)

        packer = Packer(self.length)
        try:
            for document in self._documents(name, start, stop):
                problem = problem_of_text(document, "text")
                if problem or not isinstance(document, str):
                    yield record(None, problem)
                else:
                    yield from map(record, packer.add(document))
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self._store.address(name)} cannot be read to its end: {error}") from error
        yield from map(record, packer.rest())

    def _documents(self, name: str, start: int, stop: int) -> Iterator[object]:
        """The documents of a unit; whatever stands in the place of one that is no text."""
        kind = name.lower()
        if kind.endswith(".parquet"):
            yield from self._rows(name)
            return
        with io.BufferedReader(self._store.open_input(name)) as file:
            lines = iter(gzip.GzipFile(fileobj=file)) if kind.endswith(".gz") else _lines(file, start, stop)
            if kind.endswith((".jsonl", ".jsonl.gz")):
                yield from (self._field(line) for line in lines if line.strip())
            elif self.documents == "lines":
                yield from (_text(line) for line in lines if line.strip())
            elif self.documents == "files":
                yield _text(b"".join(lines))
            else:
                for blank, part in itertools.groupby(lines, key=lambda line: not line.strip()):
                    if not blank:
                        yield _text(b"".join(part))

    def _field(self, line: bytes) -> object:
        try:
            row = json.loads(line)
        except ValueError:
            return line  # bytes are no text
        return row.get(self.column) if isinstance(row, dict) else None

    def _rows(self, name: str) -> Iterator[object]:
        with self._store.open_input(name) as file:
            table = pq.ParquetFile(file)
            if self.column not in table.schema_arrow.names:
                raise UserError(
                    f"{self._store.address(name)} has no column {self.column!r}; it has "
                    f"{', '.join(table.schema_arrow.names)}; name it with column=..."
                )
            for batch in table.iter_batches(256, columns=[self.column], use_threads=False):
                yield from batch.column(0).to_pylist()


def _lines(file: io.BufferedReader, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin from byte `start` on and before `stop`."""
    if start:
        file.seek(start - 1)
        file.readline()  # the end of a line that began before, or just its line break
    while file.tell() < stop and (line := file.readline()):
        yield line


def _text(line: bytes) -> object:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return line


class Packer:
    """Joins documents to texts of at most `length` tokens with [CLS] and [SEP], and cuts them between words."""

    def __init__(self, length: int):
        self._words, self._size = tokenizer(length), length - 2
        self._parts: list[str] = []
        self._used = 0

    def add(self, document: str) -> Iterator[str]:
        """The texts that are full by now."""
        ends, spans = self._words.words(document)
        start = word = 0
        while word < len(ends):
            last = word  # the first word that does not fit
            while last < len(ends) and ends[last] - start <= self._size - self._used:
                last += 1
            if last == word and not self._used:
                last += 1  # a word that never fits, and is cut when it is read
            if last > word:
                self._parts.append(document[spans[word][0] : spans[last - 1][1]])
                self._used += ends[last - 1] - start
                start, word = ends[last - 1], last
            if word < len(ends) or self._used >= self._size:
                yield from self.rest()

    def rest(self) -> Iterator[str]:
        """What is left, if there is anything."""
        if self._parts:
            yield "\n".join(self._parts)
        self._parts, self._used = [], 0
