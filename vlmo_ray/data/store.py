"""A folder or a bucket prefix behind one small interface, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from vlmo_ray.data import s3
from vlmo_ray.errors import UserError

_STREAM_BYTES = 4 << 20
_ANONYMOUS = "?anonymous"  # at the end of an address
_TEMPORARY = ".vlmo-tmp-"
_LONGEST_WAIT_S = 20.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")


@contextlib.contextmanager
def _explained_folder(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} does not exist") from error
    except PermissionError as error:
        raise UserError(f"{address}: permission denied; check who owns it") from error
    except IsADirectoryError as error:
        raise UserError(f"{address} is a folder, where a file is to be written") from error
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) or os.path.isdir(address):
            raise FileNotFoundError(f"{address} does not exist or is a folder") from error
        raise UserError(f"{address}: {error}") from error


@dataclass(frozen=True)
class Store:
    """A folder or `s3://bucket/prefix`; names are relative to it, with `/` between components.

    `s3://bucket/prefix?anonymous` reads a public bucket without credentials.

    Picklable: only the address travels, and another process connects anew with its own AWS variables. A missing name
    raises FileNotFoundError; every other failure raises a UserError that names the address. Requests to storage that is
    busy or away are repeated for `retry_timeout_s`, and then raise `s3.StorageBusy`.
    """

    uri: str
    retry_timeout_s: float = 0.0

    def __post_init__(self) -> None:
        uri = self.uri
        if uri.startswith("s3://"):
            path, question, flag = uri.removeprefix("s3://").partition("?")
            if question and flag != "anonymous":
                raise UserError(f"{self.uri!r} ends in ?{flag}; the only flag is ?anonymous")
            uri = f"s3://{path.strip('/')}{question}{flag}"
            if not path.strip("/"):
                raise UserError(f"{self.uri!r} names no bucket; write s3://bucket/prefix")
        else:
            path = uri.removeprefix("file://")
            if "://" in path:
                raise UserError(f"{self.uri!r}: only folders and s3:// addresses can be opened")
            # absolute, because another process may have another working directory
            uri = os.path.abspath(os.path.expanduser(path))
        object.__setattr__(self, "uri", uri)

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    @property
    def root(self) -> str:
        return self.uri.removeprefix("s3://").removesuffix(_ANONYMOUS) if self.is_s3 else self.uri

    @property
    def fs(self) -> pafs.FileSystem:
        return s3.filesystem(self.uri.endswith(_ANONYMOUS)) if self.is_s3 else pafs.LocalFileSystem()

    def _client(self, probe: bool = False):
        return s3.client(probe, self.uri.endswith(_ANONYMOUS))

    def path(self, name: str) -> str:
        """`name` for `fs`."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def address(self, name: str) -> str:
        """`name` for people."""
        uri = self.uri.removesuffix(_ANONYMOUS) if self.is_s3 else self.uri
        return f"{uri.rstrip('/')}/{name}" if name else uri

    def _bucket_key(self, name: str) -> tuple[str, str]:
        bucket, _, key = self.path(name).partition("/")
        return bucket, key

    def _errors(self, name: str):
        return (s3.explained if self.is_s3 else _explained_folder)(self.address(name))

    def patiently(self, name: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, repeated while the storage is busy; its errors explained."""
        until, wait = time.monotonic() + self.retry_timeout_s, 0.25
        while True:
            try:
                with self._errors(name):
                    return attempt()
            except s3.StorageBusy as error:
                left = until - time.monotonic()
                if left <= 0:
                    tried = f" (tried for {self.retry_timeout_s:.0f} s)" if self.retry_timeout_s else ""
                    raise s3.StorageBusy(f"{error}{tried}") from error
                time.sleep(min(left, wait * random.uniform(0.5, 1.5)))
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def open_input(self, name: str) -> pa.NativeFile:
        """The file for random access."""
        return self.patiently(name, lambda: self.fs.open_input_file(self.path(name)))

    def open_stream(self, name: str) -> pa.NativeFile:
        """The file for reading from beginning to end."""
        return self.patiently(
            name, lambda: self.fs.open_input_stream(self.path(name), compression=None, buffer_size=_STREAM_BYTES)
        )

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The whole file, or `length` bytes from `offset` (fewer if the file ends before).

        Only a whole file may be read while it is replaced.
        """
        if length is None:
            return self.read_version(name)[0][offset:]

        def attempt() -> bytes:
            with self.fs.open_input_file(self.path(name)) as file:
                return file.read_at(length, offset)

        return self.patiently(name, attempt)

    def read_version(self, name: str) -> tuple[bytes, str]:
        """The whole file and the version that `replace` takes."""

        def attempt() -> tuple[bytes, str]:
            if self.is_s3:  # one request: pyarrow's two fill up a file that got shorter in between with stray bytes
                return s3.get(self._client(), *self._bucket_key(name))
            with self.fs.open_input_file(self.path(name)) as file:
                data = file.read()
            return data, hashlib.sha256(data).hexdigest()

        return self.patiently(name, attempt)

    def write(self, name: str, data: bytes) -> None:
        """The whole file at once: a reader sees all of it or none."""
        if self.is_s3:  # without a temporary file, so that it works when the disk is full
            bucket, key = self._bucket_key(name)
            self.patiently(name, lambda: self._client().put_object(Bucket=bucket, Key=key, Body=data))
        else:
            with self.create(name) as file:
                file.write(data)

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        """Write the whole file, unless its version is another one by now; returns whether it was written.

        `version` None stands for a file that does not exist. The comparison is only as good as the place: a folder, and
        a server without conditional writes, may lose a write that another program makes within the same moment. After
        False the file may nevertheless hold `data`, if an answer was lost and the request repeated.
        """
        if self.is_s3:
            bucket, key = self._bucket_key(name)
            return self.patiently(name, lambda: s3.put_if(self._client(), bucket, key, data, version))
        try:
            current = self.read_version(name)[1]
        except FileNotFoundError:
            current = None
        if current == version:
            self.write(name, data)
        return current == version

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A local binary file to write and re-read; it becomes `name` when the block ends without an error.

        In a folder it is a temporary file beside `name`, renamed at the end. For a bucket it is uploaded at the end, in
        one or several parts, and appears when the last part has arrived.
        """
        target = None if self.is_s3 else Path(self.path(name))
        with contextlib.ExitStack() as stack:
            with self._errors(name):
                if target:
                    target.parent.mkdir(parents=True, exist_ok=True)
                folder = target.parent if target else Path(tempfile.gettempdir())
                temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
                mode = 0o666 if target else 0o600  # other users can read the common temporary folder
                file = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode), "w+b")
            stack.callback(temporary.unlink, missing_ok=True)
            stack.enter_context(file)
            try:
                yield file
            except OSError as error:
                if error.errno not in _FULL:  # any statement of the block may have raised it
                    raise
                raise UserError(f"{self.address(name) if target else temporary}: {error}") from error

            def finish() -> None:
                file.flush()
                if target:
                    os.fsync(file.fileno())
                    os.replace(temporary, target)
                else:
                    # boto3, because pyarrow's stream completes the upload even when it is closed by an error
                    self._client().upload_file(str(temporary), *self._bucket_key(name))

            self.patiently(name, finish)

    def upload(self, file: Path, name: str) -> None:
        """A local file under `name`: a reader sees all of it or none."""
        if self.is_s3:
            self.patiently(name, lambda: self._client().upload_file(str(file), *self._bucket_key(name)))
        else:
            with self.create(name) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target)

    def download(self, name: str, file: Path) -> None:
        """The file `name` as a local file, piece by piece."""

        def attempt() -> None:
            with self.fs.open_input_stream(self.path(name), compression=None) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, _STREAM_BYTES)

        self.patiently(name, attempt)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name -> bytes of the files whose names begin with `prefix`, in subfolders too, sorted by name."""
        return {name: size for name, (size, _) in self._found(prefix).items()}

    def versions(self, prefix: str = "") -> dict[str, str]:
        """As `sizes`, but name -> what changes when the file is written again: its ETag, in a folder its time."""
        return {name: version for name, (_, version) in self._found(prefix).items()}

    def _found(self, prefix: str) -> dict[str, tuple[int, str]]:
        found = self.patiently(prefix, lambda: {name: (size, version) for name, size, version in self._listed(prefix)})
        return {name: found[name] for name in sorted(found) if f"/{_TEMPORARY}" not in f"/{name}"}

    def _listed(self, prefix: str) -> Iterator[tuple[str, int, str]]:
        """Name, bytes and version of the files under a prefix; nothing else is looked at."""
        cut = len(self.root.rstrip("/")) + 1
        if self.is_s3:
            bucket, key = self._bucket_key(prefix) if prefix else self._bucket_key("")
            start = key if prefix or not key else f"{key}/"
            for page in self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # a mark that some programs put in place of a folder
                        yield f"{bucket}/{entry['Key']}"[cut:], entry["Size"], entry["ETag"]
            return
        folder, _, first = prefix.rpartition("/")
        top = Path(self.path(folder))
        if not top.is_dir():
            return
        for entry in top.iterdir():
            if not entry.name.startswith(first):
                continue
            inner = pafs.FileSelector(str(entry), allow_not_found=True, recursive=True)
            infos = self.fs.get_file_info(inner) if entry.is_dir() else [self.fs.get_file_info(str(entry))]
            files = (info for info in infos if info.type == pafs.FileType.File)
            yield from ((info.path[cut:], info.size, str(info.mtime_ns)) for info in files)

    def list(self, prefix: str = "") -> list[str]:
        """The names of `sizes`."""
        return list(self.sizes(prefix))

    def size(self, name: str) -> int | None:
        """Bytes of the file, None if there is none."""
        info = self.patiently(name, lambda: self.fs.get_file_info(self.path(name)))
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def delete(self, name: str, version: str | None = None) -> None:
        """Delete a file, of S3 only if it has this `version`; no error if there is none."""
        if self.is_s3:
            bucket, key = self._bucket_key(name)
            self.patiently(name, lambda: s3.delete(self._client(), bucket, key, version))
        else:
            self.patiently(name, lambda: Path(self.path(name)).unlink(missing_ok=True))

    def delete_folder(self, folder: str) -> None:
        """Delete everything below `folder`, which must be a name: this cannot delete the store itself."""
        assert folder.strip("/"), "refusing to delete the whole store"
        names = self.list(f"{folder}/")
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.delete, names))
        if not self.is_s3 and os.path.isdir(self.path(folder)):
            with self._errors(folder):
                self.fs.delete_dir(self.path(folder))


def store_and_name(uri: str) -> tuple[Store, str]:
    """Where a file is to be written. Raises UserError for a folder."""
    folder, _, name = uri.rpartition("/")
    store = Store(folder or ("/" if uri.startswith("/") else "."))
    if not name or (not store.is_s3 and os.path.isdir(store.path(name))):
        raise UserError(f"{uri} does not name a file; add its name")
    return store, name


def open_store(uri: str, *, create: bool = False, retry_timeout_s: float = 0.0) -> Store:
    """The store at `uri`, after a check that takes seconds, whatever `retry_timeout_s` is.

    With `create`, a missing folder is made and an empty prefix is allowed (a bucket is never made); without, both are
    errors. Raises UserError for a missing bucket, a wrong key or secret, an endpoint that does not answer, a missing
    folder, and an empty prefix.
    """
    store = Store(uri, retry_timeout_s)
    if not store.is_s3:
        if os.path.exists(store.root) and not os.path.isdir(store.root):
            raise UserError(f"{store.uri} is a file; give a folder")
        if create:
            try:
                os.makedirs(store.root, exist_ok=True)
            except OSError as error:  # a file on the way, a name that is too long, no permission
                raise UserError(f"{store.uri} cannot be made: {error.strerror}; choose another place") from error
        elif not os.path.isdir(store.root):
            raise UserError(f"the folder {store.uri} does not exist")
        return store
    with s3.explained(store.uri):
        bucket, prefix = store._bucket_key("")
        found = store._client(probe=True).list_objects_v2(
            Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", MaxKeys=1
        )
    if not create and not found.get("KeyCount"):
        raise UserError(f"{store.uri} is empty: there is nothing under this prefix")
    return store
