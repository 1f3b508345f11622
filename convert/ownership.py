"""The one place where anything on the user's disks is replaced or deleted; `destination` says where
results go.

jaxprune replaces or removes only what carries its marker and holds nothing but the files that the
marker lists, each of the size and SHA-256 that it had when it was written. It never replaces an
input, a folder that holds one, the current or the home folder, the root or a mount point, and
nothing that appeared while it worked.

A folder's marker is the file `MARKER` in it, which is written last. A single file carries its own:
a seal near its start, `SEAL` and the SHA-256 of the file with zeros in that place. Files that a
user has removed from a folder do not matter, for nothing of theirs is lost.

What is half-written lies in a folder of its own, with a random name that nobody else uses.
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
SEAL = b"jaxprune-sha256:"
UNSEALED = SEAL.decode() + 64 * "0"
"""What a file that is to be sealed has in its first `_HEAD` bytes."""
_HEAD = 4096
_digests: dict[tuple[int, ...], str] = {}
"""What `digest` found before: a file whose inode, size and times are the same is not read again."""
_whole: set[tuple[int, ...]] = set()
"""The files of `remember`, likewise."""


class Listed(Schema):
    """A file as it was when it was written.

    Attributes:
        size: bytes.
        sha256: of its content.
    """

    size: int
    sha256: str


class Marker(Schema):
    """What a folder's marker says.

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
        CheckpointError: it cannot be read.
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
    """Returns the files of a folder as they are now."""
    return {
        name: Listed(size=(folder / name).stat().st_size, sha256=digest(folder / name))
        for name in sorted(names)
    }


def mark(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Writes a finished folder's marker.

    Args:
        folder: finished.
        kind: the kind of folder.
        names: relative paths of the files that were written; what else is there stays somebody
            else's.
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
    """Returns the digest of a folder's marker, which stands for the whole folder; None where there
    is none."""
    try:
        return digest(folder / MARKER)
    except UserError:
        return None


def kind_of(folder: Path) -> str | None:
    """Returns the kind that a folder's marker says; None where there is none."""
    try:
        return schema.read(Marker, folder / MARKER).kind
    except UserError:
        return None


def prove(folder: Path) -> Marker:
    """Returns the marker of a folder that holds nothing but what jaxprune wrote.

    Raises:
        OccupiedError: something in it is not, or not any more, what jaxprune wrote; the first such
            file is named.
    """
    if not os.path.lexists(folder / MARKER):
        raise OccupiedError(
            "it carries no list of the files that jaxprune wrote, as a folder of somebody else's, "
            "or of an earlier version, so it is not replaced (move or remove it yourself)",
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
    """Raises OccupiedError for the first file, link or folder that is neither among the names nor
    holds one of them."""
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
    """Returns whether a file is a regular one with the size and the content that it had."""
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
    """Removes a folder, and those inside it, that hold nothing, or only such folders."""
    for place, _, _ in os.walk(folder, topdown=False):
        remove_empty(Path(place))


def remove_empty(folder: Path) -> bool:
    """Removes a folder that holds nothing; whether it is gone."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not os.path.lexists(folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder that holds nothing but what its marker lists; the marker goes last, so that
    a kill leaves proof.

    Raises:
        OccupiedError: see `prove`.
    """
    files = prove(folder).files
    for name, file in files.items():
        with contextlib.suppress(OSError):  # then it stays, and its folder
            if unchanged(folder / name, file):
                (folder / name).unlink()
    if not any(os.path.lexists(folder / name) for name in files):
        with contextlib.suppress(OSError):
            (folder / MARKER).unlink()
    remove_empties(folder)


def replace(finished: Path, place: Path, remove: Callable[[Path], None]) -> None:
    """Puts a finished result in the place of an earlier one, which is removed.

    Args:
        finished: a folder with its marker, or a file with its seal, on the same disk.
        place: something is there.
        remove: removes what was there; OccupiedError: it is not ours, and stays.
    """
    moved = renaming.exchange(finished, place)
    try:  # it may have been touched between the check and the exchange
        remove(moved)
    except OccupiedError:
        renaming.exchange_back(finished, place, moved)
        raise


def remove_own(path: Path) -> None:
    """Removes what lies under a random name that this program made up, half-written files included;
    or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with failing(path, "removed"):
            path.unlink()


def seal(path: Path) -> None:
    """Puts the digest of a finished file, which was written with `UNSEALED`, into its place."""
    with failing(path), path.open("r+b") as file:
        place = file.read(_HEAD).index(UNSEALED.encode()) + len(SEAL)
        hashed = _sealed_digest(path, place)
        file.seek(place)
        file.write(hashed.encode())
        file.flush()
        os.fsync(file.fileno())


def sealed(path: Path) -> bool:
    """Returns whether a file is as it was when it was sealed."""
    with open_regular(path) as file:
        if _signature(os.fstat(file.fileno())) in _whole:
            return True
        head = file.read(_HEAD)
    place = head.find(SEAL) + len(SEAL)
    return place >= len(SEAL) and head[place : place + 64] == _sealed_digest(path, place).encode()


def remember(path: Path) -> None:
    """Says that a file is known to be as it was sealed: `sealed` need not read it again."""
    _whole.add(_signature(os.stat(path)))


def remove_sealed(path: Path) -> None:
    """Removes a file of ours.

    Raises:
        OccupiedError: it is not as it was when it was sealed.
        CheckpointError: it cannot be read.
    """
    if path.is_symlink() or not sealed(path):
        raise OccupiedError("it has changed since jaxprune wrote it", file=path)
    with failing(path, "removed"):
        path.unlink()


def _sealed_digest(path: Path, place: int) -> str:
    with open_regular(path) as file, failing(path, "read"):
        whole = hashlib.sha256(file.read(place) + 64 * b"0")
        file.seek(place + 64)
        return hashlib.file_digest(file, lambda: whole).hexdigest()
