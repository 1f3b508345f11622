"""Folders and files that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert import CheckpointError


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_free(path: str | Path, *, overwrite: bool = False, folder: bool = True) -> Path:
    """The absolute path, once it is sure that a folder (or a file) may be made there.

    Raises:
        CheckpointError: something is there already, or the parent folder cannot be written.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} already exists: choose another path, or pass --overwrite to replace it")
    if path.exists() and path.is_dir() != folder:
        raise CheckpointError(
            f"{path} is a file: choose a path for a folder" if folder else f"{path} is a folder: choose a file's path"
        )
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"cannot write into {parent}: choose another path")
    return path


@contextmanager
def staged_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`; renames it to `path` at the end, or removes it after an error.

    Raises:
        CheckpointError: see `check_free`.
    """
    path = check_free(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write into {path.parent}: {error.strerror}; choose another path") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o777 & ~umask)  # mkdtemp makes private folders
        yield staged
        replace(staged, check_free(path, overwrite=overwrite))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def staged_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields the path of a file to write beside `path`; renames it to `path` at the end, or removes it after an error.

    Raises:
        CheckpointError: see `check_free`.
    """
    path = check_free(path, overwrite=overwrite, folder=False)
    staged = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write into {path.parent}: {error.strerror}; choose another path") from error
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file, or replaces one at once.

    Raises:
        CheckpointError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; free some space, or choose another path"
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def replace(staged: Path, path: Path) -> None:
    """Moves a finished folder to its place; what was there goes only once the new folder stands."""
    if not path.exists():
        staged.rename(path)
        return
    old = staged.with_name(staged.name + ".old")
    path.rename(old)
    staged.rename(path)
    shutil.rmtree(old)
