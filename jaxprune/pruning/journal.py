"""What a run has finished, on disk: entries that appear whole or not at all, and are checked when they are read.

A journal is a folder. An entry holds arrays and figures under a name such as `pruned/12`: one Orbax pytree, and
beside it a note with the figures and the digests of the pytree's files. Hidden states are entries of plain files: they
may be larger than memory, and they are only worth keeping now and then, for without them they are computed again.
What a note lists, as long as it is as it was, and nothing else in the folder, is the journal's to remove.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from convert import CheckpointError, Params, ownership, schema
from convert.errors import DamagedError, UserError
from convert.files import read_bytes, require_regular
from convert.orbax import load_tree, save_tree
from convert.ownership import Listed, failing
from convert.schema import Schema
from jaxprune import sharding as devices
from jaxprune.commands.terminal import console
from jaxprune.errors import InputError
from jaxprune.streaming.hidden_states import HiddenStates

SENSITIVITY, PRUNED, TUNING, TUNED = "sensitivity", "pruned", "tuning", "tuned"
"""The stages of a run, with which the names of entries begin."""
WEIGHTS = "weights"
"""Where notes without an entry say what is known of the dense weights; see `identity.KnownWeights`."""
PATIENCE = 20
"""Hidden states are kept when the work since the last time took so many times longer than keeping them."""
_BYTES_PER_SECOND = 5e8  # assumed of a disk until it has been seen


class AnotherRunError(InputError):
    """What a journal keeps was made from something else than what there is now."""


class Entry(NamedTuple):
    """What a journal keeps under one name.

    Attributes:
        arrays: by dotted path.
        figures: JSON.
    """

    arrays: Params
    figures: dict[str, Any]


class Note(Schema):
    """What stands beside an entry.

    Attributes:
        files: relative path of each of the entry's files -> its SHA-256.
        figures: JSON.
        digest: of the other two.
    """

    files: dict[str, str]
    figures: dict[str, Any]
    digest: str


class Journal:
    """Entries in a folder, written in the background.

    Args:
        folder: exists.
        work: a folder of the journal's own, on the same disk, for what is half-written.

    Attributes:
        folder: as given.
        work: as given.
        newly_known: gives what the next entry depends on, to be kept before it; None where there is nothing new.
    """

    def __init__(self, folder: Path, work: Path | None = None) -> None:
        self.folder, self.work = folder, work or folder / "work"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None
        self.newly_known: Callable[[], Mapping[str, Any] | None] = lambda: None
        self._resting, self._cost = time.monotonic(), 0.0

    def __contains__(self, name: str) -> bool:
        return devices.agree(self._note(name).exists() and (self.folder / name).exists())

    def names(self, stage: str) -> list[str]:
        """The names of a stage's entries or own stages, without the stage's own."""
        found = (path.name for path in (self.folder / stage).glob("*") if path.is_dir() and "." not in path.name)
        return devices.agree(sorted(found))

    def put(self, name: str, arrays: Params, figures: Mapping[str, Any]) -> None:
        """Commits an entry in the background, as soon as the one before it is committed.

        Raises:
            CheckpointError: the one before it could not be written.
        """
        self.wait()
        if devices.processes() > 1:  # Orbax makes them wait for each other, so not beside other work
            self._write(name, arrays, figures)
            devices.agree(None)
        else:
            self._pending = self._pool.submit(self._write, name, arrays, figures)

    def wait(self) -> None:
        """Returns when all entries are committed.

        Raises:
            CheckpointError: one could not be written.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def get(self, name: str) -> Entry | None:
        """An entry; None where there is none, or where it is damaged, which is said."""
        self.wait()  # Orbax's event loops don't bear each other's company
        if name not in self:
            return None
        entry = self._read(name)
        if not devices.agree(entry is not None):
            return None
        if entry is None:
            raise CheckpointError(f"{self.folder} must be on a disk that all hosts see")
        return entry

    def _read(self, name: str) -> Entry | None:
        folder = self.folder / name
        try:
            note = read_note(self._note(name))
            if note.files != {file: ownership.digest(folder / file) for file in note.files}:
                raise DamagedError("it has changed since it was written", file=folder)
            return Entry(load_tree(folder), note.figures)
        except UserError as error:
            console.print(f"{folder} is damaged and will be made again: {error}")
            return None

    def drop(self, *stages: str) -> None:
        """Removes entries, or all entries of stages, as far as they are as they were written."""
        self.wait()
        for stage in stages if devices.is_first() else ():
            for name in [name for name, _ in self._notes() if f"{name}/".startswith(f"{stage}/")]:
                self._remove(name)
            if os.path.lexists(self._note(stage)):  # it is damaged, and would be met again
                self._vacate(stage)
            ownership.remove_empty(self.folder / stage)

    def _remove(self, name: str) -> None:
        ownership.remove_listed(self.folder, self._files_of(name))

    def files(self) -> dict[str, Listed]:
        """All files of entries, by relative path, as their notes list them; a note comes behind what it lists."""
        found: dict[str, Listed] = {}
        for name, _ in self._notes():
            found |= self._files_of(name)
        return found

    def _notes(self) -> list[tuple[str, Note]]:
        """The notes that are as they were written, with the names of their entries."""
        found = []
        for place, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(place) / name != self.work]
            for path in (Path(place) / file for file in files if file.endswith(".json")):
                with contextlib.suppress(UserError):
                    found.append((str(path.relative_to(self.folder).with_suffix("")), read_note(path)))
        return sorted(found, key=lambda note: note[0])

    def _files_of(self, name: str) -> dict[str, Listed]:
        """The files of an entry and its note; none where the note is damaged."""
        note = self._note(name)
        try:
            files = {f"{name}/{file}": hashed for file, hashed in read_note(note).files.items()}
            files[f"{name}.json"] = ownership.digest(note)
        except UserError:
            return {}
        found = {}
        for file, hashed in files.items():
            path = self.folder / file
            found[file] = Listed(size=path.lstat().st_size if os.path.lexists(path) else 0, sha256=hashed)
        return found

    def worth_keeping(self, size: int) -> bool:
        """Whether so much has been done since states were last kept that keeping them costs little."""
        cost = self._cost or size / _BYTES_PER_SECOND
        return devices.agree(time.monotonic() - self._resting > PATIENCE * cost)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around the keeping of states: measures what it costs."""
        start = time.monotonic()
        yield
        self._resting = time.monotonic()
        self._cost = self._resting - start

    def keep_states(self, stage: str, position: int, states: Mapping[str, HiddenStates]) -> None:
        """Keeps states, in place of those kept before, if the work since then was long enough.

        Args:
            stage: that they belong to.
            position: what they are behind or before; of the stage's own choice.
            states: by name.

        Raises:
            CheckpointError: they cannot be written.
        """
        if not self.worth_keeping(sum(one.array.nbytes for one in states.values())) or not devices.is_first():
            return
        before = self._kept_states(stage)
        with self.keeping():
            staged = self._stage(f"{stage}/states.{position}")
            with failing(staged):
                staged.mkdir(parents=True)
                files = {kind: _transfer(staged / kind, one, write=True) for kind, one in states.items()}
            self._commit(f"{stage}/states.{position}", files, _forms(states))
        for old in before:
            if old != position:
                self._remove(f"{stage}/states.{old}")

    def position(self, stage: str) -> int | None:
        """Where the kept states of a stage are; None without any."""
        return devices.agree(max(self._kept_states(stage), default=None))

    def _kept_states(self, stage: str) -> list[int]:
        found = (path.name.partition(".")[2] for path in (self.folder / stage).glob("states.*") if path.is_dir())
        numbers = (int(number) for number in found if number.isdecimal())
        return [number for number in numbers if self._note(f"{stage}/states.{number}").exists()]

    def restore_states(self, stage: str, states: Mapping[str, HiddenStates]) -> bool:
        """Whether the kept states of a stage are whole; `states` are filled with them, or with what was left."""
        position = self.position(stage)
        if position is None:
            return False
        name = f"{stage}/states.{position}"
        folder = self.folder / name
        try:
            note = read_note(self._note(name))
            good = note.figures == _forms(states) and note.files == {
                kind: _transfer(folder / kind, one, write=False) for kind, one in states.items()
            }
        except (OSError, ValueError) as error:
            good = False
            console.print(f"cannot read {folder}: {error}")
        good = devices.agree(good)
        if not good and devices.is_first():
            console.print(f"{folder} is damaged; the hidden states are computed again")
            self._vacate(name)
        return good

    def _write(self, name: str, arrays: Params, figures: Mapping[str, Any]) -> None:
        staged = self._stage(name)
        save_tree(staged, arrays)
        if devices.is_first():
            self._commit(name, {file: ownership.digest(staged / file) for file in ownership.names(staged)}, figures)

    def _stage(self, name: str) -> Path:
        """Where an entry is made, before it is whole."""
        staged = self.work / name
        if devices.is_first():
            ownership.remove_own(staged)
        return staged

    def _commit(self, name: str, files: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        """Moves an entry to its place. Its note goes first, so that nothing is there that no note lists."""
        if known := self.newly_known():
            self._put_note(f"{WEIGHTS}/{len(self._known())}", {}, known)
        self._vacate(name)
        self._put_note(name, files, figures)
        ownership.put(self.work / name, self.folder / name)

    def _put_note(self, name: str, files: Mapping[str, str], figures: Mapping[str, Any]) -> None:
        content = {"files": dict(files), "figures": dict(figures)}
        text = json.dumps(content | {"digest": _digest_of(content)})
        ownership.put_text(self._note(name), text, self.work / f"{name}.json")

    def weights(self) -> list[dict[str, Any]]:
        """What is known of the dense weights.

        Raises:
            DamagedError: a note has changed since it was written.
        """
        return [read_note(path).figures for path in self._known()]

    def _known(self) -> list[Path]:
        return sorted((self.folder / WEIGHTS).glob("*.json"))

    def _vacate(self, name: str) -> None:
        """Makes room for an entry: what is there is removed, or put aside where it is not as it was written."""
        self._remove(name)
        for path in (self._note(name), self.folder / name):
            if os.path.lexists(path) and not ownership.remove_hollow(path):
                number = 0
                while os.path.lexists(aside := self.aside / f"{path.relative_to(self.folder)}.{number}"):
                    number += 1
                ownership.put(path, aside)

    @property
    def aside(self) -> Path:
        """The folder of what was found changed; it stays when the journal goes."""
        return self.work.with_name(f"changed-{self.work.name}")

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def close(self) -> None:
        """Commits what is not yet committed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def read_note(path: Path) -> Note:
    """A note that is as it was written.

    Raises:
        UserError: there is none, or it is not.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        raise DamagedError("it is not valid JSON", file=path) from None
    note = schema.check(Note, content, file=path)
    if note.digest != _digest_of({"files": content["files"], "figures": content["figures"]}):
        raise DamagedError("it has changed since it was written", file=path)
    return note


def _digest_of(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _forms(states: Mapping[str, HiddenStates]) -> dict[str, Any]:
    """What hidden states are, as JSON."""
    return {kind: {"dtype": one.array.dtype.name, "shape": list(one.array.shape)} for kind, one in states.items()}


def _transfer(path: Path, states: HiddenStates, *, write: bool) -> str:
    """Writes states to a file, or fills them from it; returns its digest. ValueError: the file is too short."""
    whole = hashlib.sha256()
    if not write:
        require_regular(path)
    with io.FileIO(path, "x" if write else "r") as file:
        for block in states.blocks():
            done = file.write(block) if write else file.readinto(block)
            if done != len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if write else ValueError("it is too short")
            whole.update(block)
    if write:
        ownership.remember(path, whole.hexdigest())
    return whole.hexdigest()
