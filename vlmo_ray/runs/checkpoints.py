"""The checkpoints of a run in its store: complete or invisible, checked when read, the newest good one first.

Every worker uploads its own files into `checkpoint-<step>/<attempt>/` in the background. The worker that wrote
`train_state.json`, which lists all files and the attempt (the start of the run) that wrote them, uploads it to
`checkpoint-<step>/`. A checkpoint with a missing or short file is incomplete and therefore invisible, so no worker
waits for another: a run that dies during an upload resumes from the checkpoint before. Checksums are verified on
reading. A damaged checkpoint is reported and set aside, and the one before it is used.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.progress import tracked
from vlmo_ray.runs.checkpoint import STATE, Files, measured, parse_state
from vlmo_ray.runs.events import tell
from vlmo_ray.runs.state import TrainState

_PREFIX = "checkpoint-"
_SET_ASIDE = "damaged_state.json"
_BEGUN = "has_checkpoints"  # an object in the run that marks that it had a complete checkpoint


class Damaged(UserError):
    """A file of a checkpoint has changed since it was written."""


@dataclass
class Checkpoints:
    """The checkpoints in the store `run`."""

    run: Store
    keep: int = 3  # how many of the newest complete ones stay
    keep_every: int = 0  # those whose step is a multiple of this stay for good; 0: none
    best: int | None = None  # the step whose checkpoint stays for its evaluation
    keeper: bool = False  # whether this worker deletes the others
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), repr=False)
    _pending: list[Future] = field(default_factory=list, repr=False)
    _begun: bool = False
    _newest_at: float = field(default_factory=time.monotonic, repr=False)

    def upload(self, folder: Path, state: TrainState, more: Callable[[], dict[str, bytes]] = dict) -> None:
        """Uploads the files of the run that `more` gives, then this worker's files of the checkpoint; removes `folder`.

        One upload runs at a time and another may wait for it; only with two of them this waits, for the first. Errors
        of an upload are raised by `check` and `wait`, never here, where only one worker would learn of them.
        """
        if len(unfinished := [upload for upload in self._pending if not upload.done()]) > 1:
            wait(unfinished[:1])
        self._pending.append(self._pool.submit(self._upload, folder, state, more))

    def wait(self) -> None:
        """Waits for all uploads; raises their errors."""
        wait(self._pending)
        self.check()

    def check(self) -> None:
        """Raises the errors of uploads that have ended; does not wait."""
        ended = [upload for upload in self._pending if upload.done()]
        self._pending = [upload for upload in self._pending if upload not in ended]
        for upload in ended:
            upload.result()

    def close(self) -> None:
        """Ends the upload thread after the last upload."""
        self._pool.shutdown()

    def _upload(self, folder: Path, state: TrainState, more: Callable[[], dict[str, bytes]]) -> None:
        began = time.monotonic()
        try:
            for name, content in more().items():
                self.run.write(name, content)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == STATE):
                inner = "" if file.name == STATE else f"{state.attempt}/"
                self.run.upload(file, f"{name_of(state.step)}/{inner}{file.name}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._newest_at = time.monotonic()
        if self.keeper:
            took = self._newest_at - began
            tell(
                "checkpoint", f"checkpoint of step {state.step}: stored in {took:.1f} s", step=state.step, seconds=took
            )
            self.retire()

    def age_s(self) -> float:
        """Seconds since this worker's part of the newest checkpoint was in the store, or since the start."""
        return time.monotonic() - self._newest_at

    def retire(self) -> None:
        """Deletes checkpoints that need not be kept, but never the newest complete one or anything newer."""
        listed = _listed(self.run)
        complete = list(itertools.islice(self.complete(listed), self.keep))
        if not complete:
            return
        if not self._begun:
            self.run.write(_BEGUN, b"")
            self._begun = True
        kept = {name for name, _, _ in complete}
        if self.best is not None:
            kept.add(name_of(self.best))
        if self.keep_every:
            steps = {name: name.removeprefix(_PREFIX) for name, sizes in listed.items() if STATE in sizes}
            kept |= {name for name, step in steps.items() if step.isdigit() and int(step) % self.keep_every == 0}
        for name in listed:
            if name < complete[0][0] and name not in kept:
                self.run.delete(f"{name}/{STATE}")  # first, so the rest is not taken for a checkpoint
                self.run.delete_folder(name)

    def complete(self, listed: dict[str, dict[str, int]] | None = None) -> Iterator[tuple[str, TrainState, Files]]:
        """(name, state, files) of the complete checkpoints, newest first; of those `listed`, or of all."""
        for name, sizes in reversed((_listed(self.run) if listed is None else listed).items()):
            if STATE not in sizes:
                continue
            try:
                state, files = parse_state(self.run.read(f"{name}/{STATE}"))
                if name != name_of(state.step):
                    raise ValueError(f"it is of step {state.step}")
            except FileNotFoundError:
                continue  # deleted meanwhile
            except (ValueError, KeyError, TypeError) as error:
                self._set_aside(name, f"{self.run.address(name)}/{STATE} cannot be read ({error})")
                continue
            if all(sizes.get(f"{state.attempt}/{file}") == size for file, (size, _) in files.items()):
                yield name, state, files

    def newest(self) -> TrainState | None:
        """The state of the newest complete checkpoint, without verifying its files; None if there is none."""
        return next((state for _, state, _ in self.complete()), None)

    def fetch_newest(self, folder: Path) -> str:
        """Downloads the newest good checkpoint into `folder`; returns its name, or "" if the run has none yet.

        Reports and skips incomplete and damaged ones, and sets damaged ones aside. Raises UserError if the run had
        checkpoints and none is whole.
        """
        chosen = ""
        for name, state, files in self.complete():
            try:
                self.fetch(name, state, files, folder)
            except Damaged as error:
                self._set_aside(name, str(error))
            else:
                chosen = name
                break
        listed = _listed(self.run)
        for name, sizes in listed.items():
            if name > chosen and _SET_ASIDE not in sizes:
                what = "some of its files are missing or short" if STATE in sizes else f"it has no {STATE}"
                tell("checkpoint_skipped", f"skipped {name}, which is incomplete: {what}", checkpoint=name)
        damaged = any(_SET_ASIDE in sizes for sizes in listed.values())
        if not chosen and (damaged or self.run.exists(_BEGUN)):
            raise UserError(
                f"no checkpoint of {self.run.uri} is whole ({', '.join(listed) or 'all are gone'}). Restore one from a "
                "copy of the bucket, or give another --name to start afresh"
            )
        return chosen

    def fetch(self, name: str, state: TrainState, files: Files, folder: Path) -> None:
        """Downloads one checkpoint and verifies every byte. Raises Damaged."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def download(file: str) -> None:
            for _ in range(2):  # an error may be in the transfer alone
                self.run.download(f"{name}/{state.attempt}/{file}", folder / file)
                if measured(folder / file) == files[file]:
                    return
            where = self.run.address(f"{name}/{state.attempt}/{file}")
            raise Damaged(f"{where} has changed since it was written")

        with ThreadPoolExecutor(8) as pool:
            fetched = {pool.submit(download, file): size / 1e6 for file, (size, _) in files.items()}
            for one in tracked(as_completed(fetched), f"MB of {name}", sum(fetched.values()), lambda one: fetched[one]):
                one.result()
        (folder / STATE).write_bytes(self.run.read(f"{name}/{STATE}"))

    def fetch_named(self, name: str, folder: Path) -> None:
        """Downloads the checkpoint of this name. Raises UserError if it is not complete, or damaged."""
        address = self.run.address(name)
        try:
            content = self.run.read(f"{name}/{STATE}")
            try:
                state, files = parse_state(content)
            except (ValueError, KeyError, TypeError) as error:
                why = f"{address} is damaged: its {STATE} cannot be read ({error}); name another one"
                raise UserError(why) from error
            self.fetch(name, state, files, folder)
        except FileNotFoundError as error:
            raise UserError(
                f"{address} is not complete: some of its files are missing. If a run is storing it, wait a moment"
            ) from error

    def _set_aside(self, name: str, reason: str) -> None:
        """Makes a damaged checkpoint invisible, and leaves its files in place for a person to look at."""
        tell("checkpoint_skipped", f"skipped {name}, which is damaged: {reason}", checkpoint=name)
        self.run.write(f"{name}/{_SET_ASIDE}", self.run.read(f"{name}/{STATE}"))
        self.run.delete(f"{name}/{STATE}")


def _listed(run: Store) -> dict[str, dict[str, int]]:
    """The bytes of each file in each folder of a checkpoint, whole or not, the oldest first."""
    found: dict[str, dict[str, int]] = {}
    for path, size in run.sizes(_PREFIX).items():
        name, _, file = path.partition("/")
        found.setdefault(name, {})[file] = size
    return dict(sorted(found.items()))


def stored_checkpoints(run: Store) -> dict[int, int]:
    """The bytes of each checkpoint that has its state, by step. Only names and sizes are looked at."""
    sizes = {name: files for name, files in _listed(run).items() if STATE in files}
    return {int(name.removeprefix(_PREFIX)): sum(files.values()) for name, files in sizes.items()}


def name_of(step: int) -> str:
    return f"{_PREFIX}{step:08d}"
