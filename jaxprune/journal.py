"""What a run has finished, on disk: entries that appear whole or not at all, and are checked when they are read.

A journal is a folder. An entry holds arrays and figures under a name such as `pruned/12`: one Orbax pytree, and
beside it a file with the figures and the digests of the pytree's files, whose appearance commits both. Hidden states
are plain files beside their digests: they may be larger than memory, and they are only worth keeping now and then, for
without them they are computed again.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from convert import CheckpointError, Params
from convert.orbax import load_tree, save_tree
from convert.staging import file_digest, write_text
from jaxprune import devices
from jaxprune.console import console
from jaxprune.hidden import HiddenStates

SENSITIVITY, PRUNED, TUNING, TUNED = "sensitivity", "pruned", "tuning", "tuned"
"""The stages of a run, with which the names of entries begin."""
PATIENCE = 20
"""Hidden states are kept when the work since the last time took so many times longer than keeping them."""
_BYTES_PER_SECOND = 5e8  # assumed of a disk until it has been seen


class Entry(NamedTuple):
    """What a journal keeps under one name.

    Attributes:
        arrays: by dotted path.
        figures: JSON.
    """

    arrays: Params
    figures: dict[str, Any]


class Journal:
    """Entries in a folder, written in the background.

    Args:
        folder: exists.

    Attributes:
        folder: as given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None
        self._resting, self._cost = time.monotonic(), 0.0

    def __contains__(self, name: str) -> bool:
        return devices.agree(self._note(name).exists())

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
            note = json.loads(self._note(name).read_text())
            if note.pop("digest") != _digest_of(note) or note["files"] != _digests(folder):
                raise CheckpointError("it has changed since it was written")
            return Entry(load_tree(folder), note["figures"])
        except (OSError, ValueError, KeyError) as error:
            console.print(f"{folder} is damaged and will be made again: {error}")
            return None

    def drop(self, *stages: str) -> None:
        """Removes entries, or all entries of stages."""
        self.wait()
        for stage in stages if devices.is_first() else ():
            self._note(stage).unlink(missing_ok=True)
            shutil.rmtree(self.folder / stage, ignore_errors=True)

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
        folder = self.folder / stage / f"states.{position}"
        staged = folder.with_name(f"{folder.name}.partial")
        with self.keeping():
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                staged.mkdir(parents=True)
                digests = {name: _transfer(staged / name, one, write=True) for name, one in states.items()}
                write_text(staged / "digests.json", json.dumps(digests))
                staged.rename(folder)
            except OSError as error:
                shutil.rmtree(staged, ignore_errors=True)
                raise CheckpointError(
                    f"cannot write into {self.folder}: {error.strerror}; free some space, then run the same command "
                    "again"
                ) from error
        for old in folder.parent.glob("states.*"):
            if old != folder:
                shutil.rmtree(old)

    def position(self, stage: str) -> int | None:
        """Where the kept states of a stage are; None without any."""
        found = [path.name.split(".") for path in (self.folder / stage).glob("states.*")]
        return devices.agree(max((int(name[1]) for name in found if len(name) == 2), default=None))

    def restore_states(self, stage: str, states: Mapping[str, HiddenStates]) -> bool:
        """Whether the kept states of a stage are whole; `states` are filled with them, or with what was left."""
        position = self.position(stage)
        if position is None:
            return False
        folder = self.folder / stage / f"states.{position}"
        try:
            digests = json.loads((folder / "digests.json").read_text())
            good = digests == {name: _transfer(folder / name, one, write=False) for name, one in states.items()}
        except (OSError, ValueError) as error:
            good = False
            console.print(f"cannot read {folder}: {error}")
        good = devices.agree(good)
        if not good and devices.is_first():
            console.print(f"{folder} is damaged; the hidden states are computed again")
            shutil.rmtree(folder)
        return good

    def _write(self, name: str, arrays: Params, figures: Mapping[str, Any]) -> None:
        folder = self.folder / name
        save_tree(folder, arrays)
        if not devices.is_first():
            return
        note = {"files": _digests(folder), "figures": dict(figures)}
        write_text(self._note(name), json.dumps(note | {"digest": _digest_of(note)}))

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def close(self) -> None:
        """Commits what is not yet committed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _digest_of(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """Of all files of a folder, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in paths}


def _transfer(path: Path, states: HiddenStates, *, write: bool) -> str:
    """Writes states to a file, or fills them from it; returns their digest. ValueError: the file is too short."""
    whole = hashlib.sha256(f"{states.array.dtype.name} {states.array.shape};".encode())
    with io.FileIO(path, "w" if write else "r") as file:
        for block in states.blocks():
            done = file.write(block) if write else file.readinto(block)
            if done != len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if write else ValueError("it is too short")
            whole.update(block)
    return whole.hexdigest()
