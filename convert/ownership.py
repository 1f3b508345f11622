"""Replaces and deletes files; nothing else in the project does. `destination` decides where results
go.

jaxprune replaces or removes only what has its marker and contains nothing but the files that the
marker lists, each with the size and SHA-256 that it was written with. It never replaces an input, a
folder that contains one, the current or the home folder, the root or a mount point, or anything
that appeared while it worked.

The marker of a folder is the file `MARKER` in it, which is written last. A single file has a
checksum near its start instead: `CHECKSUM` and the SHA-256 of the file with zeros in that place.
Files that a user has removed from a folder are ignored, because nothing of theirs is lost.

Unfinished files are written in a folder with a random name that no one else uses.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal

import pydantic

from convert import renaming, schema
from convert.errors import OccupiedError, UserError
from convert.files import open_regular
from convert.schema import Schema
from convert.writing import failing, require_readable, sync, write_text

MARKER = ".jaxprune-files.json"
CHECKSUM = b"jaxprune-sha256:"
EMPTY_CHECKSUM = CHECKSUM.decode() + 64 * "0"
"""The placeholder for the checksum, in the first `_HEAD` bytes of a file."""
_HEAD = 4096
_digests: dict[tuple[int, ...], str] = {}
"""Results of `digest`. A file with the same inode, size and times is not read again."""
_whole: set[tuple[int, ...]] = set()
"""The files of `remember`, identified likewise."""


class Listed(Schema):
    """A file as it was written.

    Attributes:
        size: bytes.
        sha256: the SHA-256 of its content.
    """

    size: int
    sha256: str


class Marker(Schema):
    """The content of a folder's marker.

    Attributes:
        version: the version of this schema.
        kind: the kind of the folder.
        files: relative path -> the file.
    """

    version: Literal[1] = 1
    kind: str
    files: dict[str, Listed]

    @pydantic.field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, Listed]) -> dict[str, Listed]:
        if outside := [
            name
            for name in files
            if not name or Path(name).is_absolute() or ".." in Path(name).parts
        ]:
            raise ValueError(f"a path inside the folder, not {outside[0]!r}")
        return files


def digest(path: Path) -> str:
    """Returns the SHA-256 of a regular file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_regular(path) as file:
        signature = _signature(os.fstat(file.fileno()))
        if signature not in _digests:
            with failing(path, "read"):
                hashed = hashlib.file_digest(file, "sha256").hexdigest()
            _digests[signature] = hashed
        return _digests[signature]


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return (
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def listed(folder: Path, names: Iterable[str]) -> dict[str, Listed]:
    """Returns the current size and SHA-256 of files in a folder."""
    return {
        name: Listed(size=(folder / name).stat().st_size, sha256=digest(folder / name))
        for name in sorted(names)
    }


def mark(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Writes the marker of a finished folder.

    Args:
        folder: the finished folder.
        kind: the kind of folder.
        names: relative paths of the files that were written; all other files are left to the user.
    """
    with failing(folder):
        files = listed(folder, names)
        for path in {folder / name for name in files} | {(folder / name).parent for name in files}:
            sync(path)
        write_text(
            folder / MARKER, Marker(kind=kind, files=files).model_dump_json(exclude_defaults=False)
        )
        sync(folder)


def marker_of(folder: Path) -> str | None:
    """Returns the digest of a folder's marker, which identifies the whole folder; None if it has
    none."""
    try:
        return digest(folder / MARKER)
    except UserError:
        return None


def kind_of(folder: Path) -> str | None:
    """Returns the kind in a folder's marker; None if it has none."""
    try:
        return schema.read(Marker, folder / MARKER).kind
    except UserError:
        return None


def verify(folder: Path) -> Marker:
    """Verifies that a folder contains only what jaxprune wrote, and returns its marker.

    Raises:
        OccupiedError: the folder has no marker, or a file is untracked or has changed; the error
            names the first such file.
    """
    if not os.path.lexists(folder / MARKER):
        raise OccupiedError(
            "it has no list of the files that jaxprune wrote, so it is not replaced: move or "
            "remove it yourself",
            file=folder,
        )
    marker = schema.read(Marker, folder / MARKER, error=OccupiedError)
    require_listed(folder, marker.files.keys() | {MARKER})
    for name, file in marker.files.items():
        if os.path.lexists(folder / name) and not unchanged(folder / name, file):
            raise OccupiedError(
                "it has changed since jaxprune wrote it, so its folder is not replaced: move or "
                "remove that yourself",
                file=folder / name,
            )
    return marker


def require_listed(folder: Path, names: Collection[str]) -> None:
    """Raises OccupiedError for the first untracked file, link or folder: one that is neither in
    `names` nor a parent of one of them."""
    holding = {str(parent) for name in names for parent in Path(name).parents}
    for place, folders, files in os.walk(folder, onerror=require_readable):
        folders.sort()
        inside = Path(place).relative_to(folder)
        for name in sorted(files) + folders:
            path = str(inside / name)
            leads = name in folders and path in holding and not os.path.islink(folder / path)
            if path not in names and not leads:
                raise OccupiedError(
                    "jaxprune did not write it, so its folder is neither replaced nor removed: "
                    "move it away",
                    file=folder / path,
                )


def unchanged(path: Path, file: Listed) -> bool:
    """Returns whether a file is still a regular file with the same size and content."""
    try:
        found = os.lstat(path)
        return (
            stat.S_ISREG(found.st_mode)
            and found.st_size == file.size
            and digest(path) == file.sha256
        )
    except (OSError, UserError):
        return False


def remove_empties(folder: Path) -> None:
    """Removes a folder, and the folders in it, if they contain no files."""
    for place, _, _ in os.walk(folder, topdown=False):
        remove_empty(Path(place))


def remove_empty(folder: Path) -> bool:
    """Removes a folder if it is empty, and returns whether it is gone."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not os.path.lexists(folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder that contains only what its marker lists. The marker is removed last, so the
    folder can still be verified if the removal is interrupted.

    Raises:
        OccupiedError: see `verify`.
    """
    files = verify(folder).files
    for name, file in files.items():
        with contextlib.suppress(OSError):  # the file then stays, and so does its folder
            if unchanged(folder / name, file):
                (folder / name).unlink()
    if not any(os.path.lexists(folder / name) for name in files):
        with contextlib.suppress(OSError):
            (folder / MARKER).unlink()
    remove_empties(folder)


def replace(finished: Path, place: Path, remove: Callable[[Path], None]) -> None:
    """Replaces an earlier result with a finished one, and removes the earlier one.

    Args:
        finished: a folder with its marker, or a file with its checksum, on the same disk.
        place: the path of the earlier result.
        remove: removes the earlier result, or raises OccupiedError if jaxprune did not write it; it
            then stays.
    """
    moved = renaming.exchange(finished, place)
    try:  # it may have changed between the check and the exchange
        remove(moved)
    except OccupiedError:
        renaming.exchange_back(finished, place, moved)
        raise


def remove_own(path: Path) -> None:
    """Removes a path with a random name that this program chose, with unfinished files; it may be
    missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with failing(path, "removed"):
            path.unlink()


def add_checksum(path: Path) -> None:
    """Writes the checksum of a finished file over its `EMPTY_CHECKSUM` placeholder."""
    with failing(path), path.open("r+b") as file:
        place = file.read(_HEAD).index(EMPTY_CHECKSUM.encode()) + len(CHECKSUM)
        hashed = _digest_without_checksum(path, place)
        file.seek(place)
        file.write(hashed.encode())
        file.flush()
        os.fsync(file.fileno())


def has_checksum(path: Path) -> bool:
    """Returns whether a file has the checksum that it was finished with."""
    with open_regular(path) as file:
        if _signature(os.fstat(file.fileno())) in _whole:
            return True
        head = file.read(_HEAD)
    place = head.find(CHECKSUM) + len(CHECKSUM)
    return (
        place >= len(CHECKSUM)
        and head[place : place + 64] == _digest_without_checksum(path, place).encode()
    )


def remember(path: Path) -> None:
    """Marks a file as verified: `sealed` does not read it again while its inode, size and times
    stay."""
    _whole.add(_signature(os.stat(path)))


def remove_unchanged(path: Path) -> None:
    """Removes a file that jaxprune wrote.

    Raises:
        OccupiedError: its checksum is wrong, or it is a symbolic link.
        CheckpointError: it cannot be read.
    """
    if path.is_symlink() or not has_checksum(path):
        raise OccupiedError("it has changed since jaxprune wrote it", file=path)
    with failing(path, "removed"):
        path.unlink()


def _digest_without_checksum(path: Path, place: int) -> str:
    with open_regular(path) as file, failing(path, "read"):
        whole = hashlib.sha256(file.read(place) + 64 * b"0")
        file.seek(place + 64)
        return hashlib.file_digest(file, lambda: whole).hexdigest()
