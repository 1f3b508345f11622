"""The folder OUT.unfinished beside the checkpoint to be, where a run keeps what is finished: what
may be in it.

The folder holds its marker, with a random token; run.json, which says what run it is; entries (see
`journal`); and work-TOKEN, where all is made: entries that are being written, and the result.
finished.json says that the result is complete; from then on it is only moved to its place.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import Field

from convert import CheckpointError, ownership, schema
from convert.errors import Change, OccupiedError, UserError
from convert.ownership import MARKER, Marker
from convert.schema import Schema
from jaxprune.pruning.journal import Journal

IDENTITY, LOCK, FINISHED, RESULT, MASKS = "run.json", "lock", "finished.json", "result", "masks"
KIND = "journal"
NEW_MARKER = f"{MARKER}.new"
OTHER = {"out": Change.OTHER}
Token = Annotated[str, Field(pattern="^[0-9a-f]*$", max_length=64)]


class JournalMarker(Marker):
    """The marker of a journal.

    Attributes:
        token: random, in the names of the folders that are the journal's whatever they hold.
    """

    token: Token


class Masks(Schema):
    """The finished masks of a run: where they are to be, and their digest."""

    path: str
    sha256: str


class Finished(Schema):
    """What finished.json says.

    Attributes:
        token: the journal's.
        run: digest of the run's identity.
        result: the digest of the result's marker.
        masks: None where none are asked for.
    """

    token: Token
    run: str
    result: str
    masks: Masks | None

    def made(self, masks: Path | None) -> bool:
        """Returns whether the run's result is what is asked for now."""
        return (str(masks) if masks else None) == (self.masks.path if self.masks else None)

    def masks_are_published(self) -> bool:
        return self.masks is None or digest_at(Path(self.masks.path)) == self.masks.sha256

    def is_published(self, out: Path) -> bool:
        return ownership.marker_of(out) == self.result and self.masks_are_published()


def journal_folder(out: Path) -> Path:
    """Returns where the journal of the run that makes `out` is."""
    return out.with_name(f"{out.name}.unfinished")


def look(out: Path) -> Finished | None:
    """Makes sure that a run may use its journal, before it does anything; writes nothing.

    Args:
        out: the folder that the run makes.

    Returns:
        What an earlier process of the run finished.

    Raises:
        OccupiedError: something of somebody else's is where the journal is to be.
    """
    folder = journal_folder(out)
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(
            f"it cannot be used ({problem.strerror})", file=folder, options=OTHER
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise OccupiedError(
            f"it is {kind}, where the run keeps what is finished", file=folder, options=OTHER
        )
    marker = marker_of(folder)
    if marker is None:
        if is_new(folder):
            return None
        names = sorted(name for name in os.listdir(folder) if name != LOCK)
        if names != [FINISHED]:
            raise OccupiedError(
                "jaxprune did not make it, though the run needs the name: move it away",
                file=folder / names[0],
                options=OTHER,
            )
    else:
        # another process works there, as the lock will tell
        with contextlib.suppress(FileNotFoundError):
            require_listed(folder, marker)
    return finished_of(folder, marker)


def marker_of(folder: Path) -> JournalMarker | None:
    path = folder / MARKER
    return schema.read(JournalMarker, path, error=OccupiedError) if os.path.lexists(path) else None


def is_new(folder: Path) -> bool:
    """Returns whether a folder without a marker is as a journal's first moments leave it."""
    names = set(os.listdir(folder)) - {NEW_MARKER}
    return not names or (names == {LOCK} and (folder / LOCK).lstat().st_size == 0)


def require_listed(folder: Path, marker: JournalMarker) -> None:
    """Raises OccupiedError for the first file in the journal that is not its own; what has changed
    is left aside."""
    journal = Journal(folder, folder / work_name(marker.token))
    names = {
        MARKER,
        NEW_MARKER,
        LOCK,
        IDENTITY,
        FINISHED,
        *marker.files,
        *journal.files(),
    }
    own = {journal.work.name, journal.aside.name}
    damaged: set[str] = set()  # notes that list nothing any more
    for name in ownership.strange(folder, names):
        top = Path(name).parts[0]
        entry = name.removesuffix(".json")
        if (
            top in own
            or ownership.is_hollow(folder / name)
            or any(name.startswith(f"{one}/") or name == one for one in damaged)
        ):
            continue
        if name.endswith(".json") and len(Path(name).parts) > 1 and (folder / entry).is_dir():
            damaged.add(entry)
            continue
        if (folder / f"{name}.json").is_file() and len(Path(name).parts) > 1:
            damaged.add(name)
            continue
        raise OccupiedError(
            "jaxprune did not write it, and the run's folder for what is finished is to be removed "
            "in the end: move it "
            "away",
            file=folder / name,
            options=OTHER,
        )


def finished_of(folder: Path, marker: JournalMarker | None) -> Finished | None:
    path = folder / FINISHED
    if not os.path.lexists(path):
        return None
    found = schema.read(Finished, path)
    return found if marker is None or found.token == marker.token else None


def digest_at(path: Path) -> str | None:
    try:
        return ownership.digest(path)
    except UserError:
        return None


def work_name(token: str) -> str:
    return f"work-{token}"


def result_folder(journal: Journal) -> Path:
    """Returns the folder that the checkpoint is made at."""
    return journal.work / RESULT


def masks_file(journal: Journal) -> Path:
    """Returns the file that the masks are made at."""
    return journal.work / MASKS
