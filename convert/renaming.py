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

    Where the disk (NFS, for example) has no such call, the name is claimed first: by an empty
    folder, over which only a folder can be renamed, or by a second link of the file.

    Raises:
        FileExistsError: something is there.
        OSError: it cannot be renamed.
    """
    if _rename(source, target, _NEW):
        return
    if source.is_dir():
        target.mkdir()
        source.rename(target)
    else:
        os.link(source, target, follow_symlinks=False)
        source.unlink()


def exchange(one: Path, other: Path) -> None:
    """Exchanges two files or two folders.

    Where the disk has no such call, `other` is moved aside first; a kill between leaves it there,
    as NAME.old beside `one`.

    Raises:
        OSError: they cannot be exchanged.
    """
    if _rename(one, other, _EXCHANGE):
        return
    aside = one.with_name(f"{one.name}.old")
    rename_new(other, aside)
    rename_new(one, other)
    rename_new(aside, one)


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
