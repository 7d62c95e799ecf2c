"""WebDataset tars as a strict stream of members, and the samples that these make up.

Python's `tarfile` stops without an error at a damaged header in the middle of a file, and what follows would be lost.
Here every byte is accounted for. Nothing is written to the disk, so member names need no checks.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from vlmo_ray.data.schema import Field, Record, Schema, encodable

_MARKING_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # one makes a record; indices that are stored rely on it
IMAGE_SUFFIXES = (*_MARKING_SUFFIXES, "gif", "bmp", "tif", "tiff")
_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME_BYTES = 1 << 20
_READ_BYTES = 16 << 20


class TarError(ValueError):
    """What is wrong with a tar; the caller adds its address."""


@dataclass
class Member:
    """One member: `raw` is all its bytes from `offset` on (headers, data, padding); `data` is a view of the data.

    The `raw` of all members, concatenated, is the tar up to its end mark.
    """

    offset: int
    name: str
    is_file: bool
    raw: bytes
    data: memoryview
    is_link: bool = False


@dataclass
class Sample:
    """The consecutive members of one key: lower-case suffix -> data, and all their bytes."""

    key: str
    offset: int
    files: dict[str, memoryview] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)
    links: set[str] = field(default_factory=set)  # suffixes of members without data of their own
    repeated: bool = False  # a suffix is there twice; only the first is in `files`

    def is_record(self, schema: Schema) -> bool:
        """Whether a member is an image, a text or a declared column; other samples (a lone JSON) are skipped."""
        declared = (suffix for column in schema.fields for suffix in _suffixes(column, _MARKING_SUFFIXES))
        return any(suffix in self.files for suffix in (*_MARKING_SUFFIXES, "txt", *declared))


def iter_members(read: Callable[[int], bytes], *, whole: bool = True) -> Iterator[Member]:
    """The members of a tar, in order, from `read(n)`; `whole` also requires the end-of-archive mark.

    Raises TarError if the tar is cut short or a header is damaged.
    """
    offset, last, zeros = 0, "its beginning", 0

    def take(n: int, what: str, may_end: bool = False) -> bytes:
        nonlocal offset
        blocks, missing = [], n
        while missing:
            block = read(min(missing, _READ_BYTES))  # a damaged size must not allocate all memory
            if not block and may_end and missing == n:
                return b""
            if not block:
                raise TarError(f"the tar is cut short in {what}, after byte {offset + n - missing}")
            blocks.append(block)
            missing -= len(block)
        offset += n
        return b"".join(blocks)

    while True:
        header = take(_BLOCK, f"the header after {last}", may_end=True)
        if not header:
            if whole and not zeros:
                raise TarError(f"the tar has no end mark after {last}: it is cut short")
            return
        if header.count(0) == _BLOCK:  # end of archive; more members follow if tars were concatenated
            zeros += _BLOCK
            continue
        start, raw, overrides = offset - _BLOCK - zeros, [bytes(zeros)], {}
        while True:
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                at = offset - _BLOCK
                if not at and header.startswith((b"\x1f\x8b", b"BZh")):
                    raise TarError("it is compressed; name it .tar.gz or .tar.bz2") from error
                raise TarError(f"the header after {last} (byte {at}) is damaged: {error}") from error
            raw.append(header)
            if info.type in (tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGLINK):
                raise TarError(f"{info.name} is a sparse file or a long link, which a data set does not have")
            name, size = overrides.get("path", info.name), int(overrides.get("size", info.size))
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
                size = info.size
                if size > _MAX_NAME_BYTES:
                    raise TarError(f"an extended header after {last} is {size} bytes long: it is damaged")
            elif not (info.isreg() or info.type in tarfile.SUPPORTED_TYPES):
                raise TarError(f"{name} has the unknown member type {info.type!r}")
            elif not info.isreg():
                size = 0
            if size < 0:
                raise TarError(f"{name} has a negative size: its header is damaged")
            body = take(-(-size // _BLOCK) * _BLOCK, name)
            raw.append(body)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                overrides["path"] = body[:size].rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                overrides |= _pax_records(body[:size])
            elif info.type != tarfile.XGLTYPE:
                break
            header = take(_BLOCK, f"the header after {name}")
        last, zeros = name, 0
        yield Member(start, name, info.isreg(), b"".join(raw), memoryview(body)[:size], info.islnk() or info.issym())


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            raise TarError("an extended header is damaged")
        key, _, value = rest[: int(length) - len(length) - 1].removesuffix(b"\n").partition(b"=")
        if key == b"size" and not value.isdigit():
            raise TarError("an extended header has a size that is not a number")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")  # without a byte order mark


def iter_samples(members: Iterable[Member]) -> Iterator[Sample]:
    """Consecutive regular members with the same key; the key ends at the first dot of the file name.

    Folders and hidden files (`._x.jpg` and `__MACOSX` of macOS) belong to the sample before them.
    """
    sample = None
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}{slash}{stem}"
        has_key = (member.is_file or member.is_link) and bool(stem) and "__MACOSX/" not in member.name
        if sample is not None and (not has_key or key == sample.key):
            sample.raw.append(member.raw)
        else:
            if sample is not None:
                yield sample
            sample = Sample(key, member.offset, raw=[member.raw])
        if has_key and member.is_link:
            sample.links.add(suffix.lower())
        elif has_key:
            sample.repeated |= suffix.lower() in sample.files
            sample.files.setdefault(suffix.lower(), member.data)
    if sample is not None:
        yield sample


def _suffixes(column: Field, pictures: tuple[str, ...] = IMAGE_SUFFIXES) -> tuple[str, ...]:
    """The suffixes of members that may hold a column, in order of preference; other columns are in the JSON."""
    match column.name, column.kind:
        case "image", "image":
            return pictures
        case name, "image" | "mask":
            return tuple(f"{name.lower()}.{suffix}" for suffix in pictures)
        case "text", "text":
            return ("txt",)
        case "label", "label":
            return ("cls",)
    return ()


def record_of(tar_name: str, sample: Sample, schema: Schema, names: Collection[str] | None = None) -> Record:
    """The record of a sample, with the fields `names` (by default all) and a problem if they cannot be read.

    An image or mask is the member `<key>.<field>.<suffix>`, or for the field "image" `<key>.jpg` and the like. "text"
    is the member `.txt`, otherwise `caption` in the JSON. "label" is the member `.cls`, otherwise in the JSON by its
    name, as all other fields are. The JSON may also have `id`, `image_id` and `forbid`.
    """
    address = encodable(f"{tar_name}/{sample.key}")
    record, files = Record(address, address, {}), sample.files
    try:
        facts = json.loads(bytes(files["json"])) if "json" in files else {}
        if not isinstance(facts, dict):
            raise ValueError("not an object")
        record.id, record.image_id = (
            address if facts.get(name) is None else encodable(str(facts[name])) for name in ("id", "image_id")
        )
        forbid = facts.get("forbid") or ()
        record.forbid = (forbid,) if isinstance(forbid, str) else tuple(map(str, forbid))
    except (ValueError, TypeError, RecursionError):
        record.problem = "the .json member cannot be read"
        return record
    for column in schema.fields:
        if names is not None and column.name not in names:
            continue
        suffix = next((suffix for suffix in _suffixes(column) if suffix in files), None)
        if suffix is None and column.kind not in ("image", "mask"):
            record.values[column.name] = facts.get("caption" if column.name == "text" else column.name)
        elif suffix is not None:
            data = bytes(files[suffix])
            try:
                value = {"txt": _text, "cls": int}.get(suffix, bytes)(data)
            except ValueError:
                record.problem = f"the .{suffix} member is not {'UTF-8' if suffix == 'txt' else 'an integer'}"
            else:
                record.values[column.name] = value
    return record
