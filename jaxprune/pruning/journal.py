"""What a run has finished, on disk: entries that appear whole or not at all, and are checked when
they are read.

A journal is a folder. An entry holds arrays and metadata under a name such as `pruned/12`: one
Orbax pytree, and beside it a note with the metadata and the digests of the pytree's files. What a
note lists, as long as it is as it was, and nothing else in the folder, is the journal's to remove.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from convert import CheckpointError, Params, ownership, schema, writing
from convert.errors import DamagedError, UserError
from convert.files import read_bytes
from convert.orbax import load_tree, save_tree
from convert.ownership import Listed
from convert.schema import Schema
from jaxprune.errors import InputError
from jaxprune.processes.collective import barrier, broadcast, is_first_process

EXPERTS, SENSITIVITY, PRUNED, TUNING, TUNED, QUANTIZED = (
    "experts",
    "sensitivity",
    "pruned",
    "tuning",
    "tuned",
    "quantized",
)
"""The stages of a run, with which the names of entries begin."""
CURVE = "curve"
"""The entry of a tuning's measures, once it has ended."""
WEIGHTS = "weights"
"""Where notes without an entry say what is known of the dense weights; see
`identity.KnownWeights`."""
PATIENCE = 20
"""Large states are kept when the work since the last time took so many times longer than keeping
them."""
_BYTES_PER_SECOND = 5e8  # assumed of a disk until it has been seen
log = logging.getLogger(__name__)


class AnotherRunError(InputError):
    """What a journal keeps was made from something else than what there is now."""


class DamagedEntryError(InputError):
    """An entry of a journal was damaged while the run used it."""

    again = "without what is damaged,"


class Entry(NamedTuple):
    """What a journal keeps under one name.

    Attributes:
        arrays: the arrays by dotted path.
        metadata: JSON.
    """

    arrays: Params
    metadata: dict[str, Any]


class Note(Schema):
    """What stands beside an entry.

    Attributes:
        files: relative path of each of the entry's files -> its SHA-256.
        figures: the metadata, JSON.
        digest: the digest of the other two.
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
        folder, work: as given.
        newly_known: returns what the next entry depends on, to be kept before it; None where there
            is nothing new.
    """

    def __init__(self, folder: Path, work: Path | None = None) -> None:
        self.folder, self.work = folder, work or folder / "work"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None
        self.newly_known: Callable[[], Mapping[str, Any] | None] = lambda: None
        self._last_kept, self._cost = time.monotonic(), 0.0

    def __contains__(self, name: str) -> bool:
        return broadcast(self.note(name).exists() and (self.folder / name).exists())

    def names(self, stage: str) -> list[str]:
        """Returns the names of a stage's entries, or of the stages inside it, without `STAGE/`
        before them."""
        found = (
            path.name
            for path in (self.folder / stage).glob("*")
            if path.is_dir() and "." not in path.name
        )
        return broadcast(sorted(found))

    def put(self, name: str, arrays: Params, metadata: Mapping[str, Any]) -> None:
        """Commits an entry in the background, as soon as the one before it is committed.

        Raises:
            CheckpointError: the one before it could not be written.
        """
        self.wait()
        # Orbax makes them wait for each other, so not beside other work
        if jax.process_count() > 1:
            self._write(name, arrays, metadata)
            barrier()
        else:
            self._pending = self._pool.submit(self._write, name, arrays, metadata)

    def wait(self) -> None:
        """Returns when all entries are committed.

        Raises:
            CheckpointError: one could not be written.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def get(self, name: str) -> Entry | None:
        """Returns an entry; None where there is none, or where it is damaged, which is said."""
        self.wait()  # Orbax's event loops don't bear each other's company
        if name not in self:
            return None
        entry = self._read(name)
        if not broadcast(entry is not None):
            return None
        if entry is None:
            raise CheckpointError(f"{self.folder} must be on a disk that all hosts see")
        return entry

    def _read(self, name: str) -> Entry | None:
        folder = self.folder / name
        try:
            note = read_note(self.note(name))
            if note.files != {file: ownership.digest(folder / file) for file in note.files}:
                raise DamagedError("it has changed since it was written", file=folder)
            return Entry(load_tree(folder), note.figures)
        except UserError as error:
            log.warning("%s is damaged and will be made again: %s", folder, error)
            return None

    def drop(self, *stages: str) -> None:
        """Removes entries, or all entries of stages, as far as they are as they were written."""
        self.wait()
        for stage in stages if is_first_process() else ():
            for name in [name for name, _ in self._notes() if f"{name}/".startswith(f"{stage}/")]:
                self.remove(name)
            if os.path.lexists(self.note(stage)):  # it is damaged, and would be met again
                self.vacate(stage)
            ownership.remove_empty(self.folder / stage)

    def remove(self, name: str) -> None:
        """Removes the files of an entry that are as they were written."""
        ownership.remove_listed(self.folder, self._files_of(name))

    def files(self) -> dict[str, Listed]:
        """Returns all files of entries, by relative path, as their notes list them; a note follows
        what it lists."""
        found: dict[str, Listed] = {}
        for name, _ in self._notes():
            found |= self._files_of(name)
        return found

    def _notes(self) -> list[tuple[str, Note]]:
        """Returns the notes that are as they were written, with the names of their entries."""
        found = []
        for place, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(place) / name != self.work]
            for path in (Path(place) / file for file in files if file.endswith(".json")):
                with contextlib.suppress(UserError):
                    found.append(
                        (str(path.relative_to(self.folder).with_suffix("")), read_note(path))
                    )
        return sorted(found, key=lambda note: note[0])

    def _files_of(self, name: str) -> dict[str, Listed]:
        """Returns the files of an entry and its note; none where the note is damaged."""
        note = self.note(name)
        try:
            files = {f"{name}/{file}": hashed for file, hashed in read_note(note).files.items()}
            files[f"{name}.json"] = ownership.digest(note)
        except UserError:
            return {}
        found = {}
        for file, hashed in files.items():
            path = self.folder / file
            found[file] = Listed(
                size=path.lstat().st_size if os.path.lexists(path) else 0, sha256=hashed
            )
        return found

    def worth_keeping(self, size: int) -> bool:
        """Returns whether so much has been done since states were last kept that keeping so many
        bytes costs little."""
        cost = self._cost or size / _BYTES_PER_SECOND
        return broadcast(time.monotonic() - self._last_kept > PATIENCE * cost)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Measures what the keeping of states inside it costs."""
        start = time.monotonic()
        yield
        self._last_kept = time.monotonic()
        self._cost = self._last_kept - start

    def _write(self, name: str, arrays: Params, metadata: Mapping[str, Any]) -> None:
        staged = self.staging_place(name)
        save_tree(staged, arrays)
        if is_first_process():
            self.commit(
                name,
                {file: ownership.digest(staged / file) for file in writing.names(staged)},
                metadata,
            )

    def staging_place(self, name: str) -> Path:
        """Returns where an entry is made before it is whole; nothing is there."""
        staged = self.work / name
        if is_first_process():
            ownership.remove_own(staged)
        return staged

    def commit(self, name: str, files: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
        """Moves a whole entry to its place. Its note goes first, so that nothing is there that no
        note lists.

        Args:
            name: the name of the entry, which was made at its staging place.
            files: relative path of each of its files -> SHA-256.
            metadata: JSON.
        """
        if known := self.newly_known():
            self._put_note(f"{WEIGHTS}/{len(self._known())}", {}, known)
        self.vacate(name)
        self._put_note(name, files, metadata)
        writing.put(self.work / name, self.folder / name)

    def _put_note(self, name: str, files: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
        content = {"files": dict(files), "figures": dict(metadata)}
        text = json.dumps(content | {"digest": _digest_of(content)})
        writing.put_text(self.note(name), text, self.work / f"{name}.json")

    def weights(self) -> list[dict[str, Any]]:
        """Returns what is known of the dense weights.

        Raises:
            DamagedError: a note has changed since it was written.
        """
        return [read_note(path).figures for path in self._known()]

    def _known(self) -> list[Path]:
        return sorted((self.folder / WEIGHTS).glob("*.json"))

    def vacate(self, name: str) -> None:
        """Makes room for an entry: what is there is removed, or put aside where it is not as it was
        written."""
        self.remove(name)
        for path in (self.note(name), self.folder / name):
            if os.path.lexists(path) and not ownership.remove_hollow(path):
                number = 0
                while os.path.lexists(
                    aside := self.aside / f"{path.relative_to(self.folder)}.{number}"
                ):
                    number += 1
                writing.put(path, aside)

    @property
    def aside(self) -> Path:
        """The folder of what was found changed; it stays when the journal goes."""
        return self.work.with_name(f"changed-{self.work.name}")

    def note(self, name: str) -> Path:
        """Returns the place of an entry's note."""
        return self.folder / f"{name}.json"

    def close(self) -> None:
        """Commits what is not yet committed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def read_note(path: Path) -> Note:
    """Reads a note that is as it was written.

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
