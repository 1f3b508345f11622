"""Writes files through to the disk, and moves them into place without replacing anything."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from convert import renaming
from convert.errors import CheckpointError, NoRoomError, OccupiedError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def names(folder: Path) -> list[str]:
    """Returns the sorted relative paths of all files and links in a folder, at any depth.

    The list is empty if the folder does not exist.

    Raises:
        CheckpointError: a folder cannot be listed.
    """
    found: list[str] = []
    walked = os.walk(folder, onerror=require_readable) if folder.is_dir() else ()
    for place, folders, files in walked:
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in files + links]
    return sorted(found)


def write_text(path: Path, text: str) -> None:
    """Writes a text file and syncs it to the disk.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with failing(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def reserve(path: Path, size: int) -> None:
    """Allocates a file's disk space, which detects a disk that is too small before any work.

    Raises:
        NoRoomError: the disk has not enough space.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
    except OSError as error:
        raise NoRoomError(
            f"no room for {size / 1e9:.2f} GB ({error.strerror})", file=path.parent
        ) from error


def put(work: Path, path: Path) -> None:
    """Moves finished work to its place, and replaces nothing.

    Raises:
        OccupiedError: something is there already.
        CheckpointError: it cannot be moved.
    """
    with failing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            renaming.rename_new(work, path)
        except FileExistsError:
            raise OccupiedError(
                "jaxprune did not write it, so it is not replaced: move it away", file=path
            ) from None
        sync(path.parent)


def sync(path: Path) -> None:
    """Syncs a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        # some file systems cannot sync folders
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def failed(problem: OSError, path: Path, what: str = "written") -> CheckpointError:
    """Returns the error for a file that could not be written or read."""
    kind = NoRoomError if problem.errno in _FULL else CheckpointError
    error = kind(f"it cannot be {what} ({problem.strerror or problem})", file=path)
    error.again = error.again or f"once it can be {what},"
    return error


@contextlib.contextmanager
def failing(path: Path, what: str = "written") -> Iterator[None]:
    """Turns OSError into CheckpointError or NoRoomError."""
    try:
        yield
    except OSError as problem:
        raise failed(problem, path, what) from problem


def require_readable(problem: OSError) -> NoReturn:
    """Raises CheckpointError for a folder that cannot be listed; a callback for `os.walk`."""
    raise CheckpointError(
        f"it cannot be listed ({problem.strerror})", file=problem.filename
    ) from problem
