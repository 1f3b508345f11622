"""Renames that replace nothing, and exchanges, which the system's own calls do in one step."""

import ctypes
import errno
import os
import sys
from pathlib import Path

# RENAME_EXCL, _SWAP; RENAME_NOREPLACE, _EXCHANGE
_NEW, _EXCHANGE = (4, 2) if sys.platform == "darwin" else (1, 2)
_AT_FDCWD = -100
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def rename_new(source: Path, target: Path) -> None:
    """Renames a file or a folder to where nothing is.

    Where the disk (NFS, for example) has no such call, a file gets a second link first. A folder is
    renamed: at most, that replaces an empty folder that appears in the same instant.

    Raises:
        FileExistsError: something is there.
        OSError: it cannot be renamed.
    """
    if _rename(source, target, _NEW):
        return
    if source.is_dir():
        _move(source, target)
    else:
        os.link(source, target, follow_symlinks=False)
        source.unlink()


def old(one: Path) -> Path:
    """Returns where `exchange` moves the other of two, on a disk that has no such call."""
    return one.with_name(f"{one.name}.old")


def exchange(one: Path, other: Path) -> Path:
    """Exchanges two files or two folders.

    Where the disk has no such call, `other` moves to `old(one)` first, and stays there. A kill
    between leaves nothing at `other`, and both beside each other.

    Args:
        one: in a folder that nobody else uses.
        other: of the same kind.

    Returns:
        Where `other` is.

    Raises:
        OSError: they cannot be exchanged.
    """
    if _rename(one, other, _EXCHANGE):
        return one
    _move(other, old(one))
    rename_new(one, other)
    return old(one)


def exchange_back(one: Path, other: Path, moved: Path) -> None:
    """Undoes `exchange`, which returned `moved`."""
    if moved == one:
        exchange(one, other)
    else:
        rename_new(other, one)
        rename_new(moved, other)


def _move(source: Path, target: Path) -> None:
    """Renames in one step, unless something is there already."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Returns whether the system's call did it; False where there is no such call, or the disk does
    not know it."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        done = library.renamex_np(*paths, flag)
    elif hasattr(library, "renameat2"):
        done = library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flag)
    else:
        return False
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
