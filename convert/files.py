"""Opens files from users: only regular ones, and with a limit on the bytes that are read."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from convert.errors import CheckpointError, DamagedError, UserError

JSON_BYTES = 256 * 2**20
"""Maximum size of a JSON file; the largest tokenizers have some tens of MB."""


def expand(path: str | Path) -> Path:
    """Returns a path with a leading `~` or `~user` replaced by that user's home folder.

    Raises:
        CheckpointError: the user or home folder is unknown, or no file can have this name.
    """
    if not str(path):
        raise CheckpointError("a path is empty")
    try:
        found = Path(path).expanduser()
        impossible = b"\0" in os.fsencode(found)
    except RuntimeError:
        raise CheckpointError(
            "no home folder is known for its ~", file=path, wanted="a path without ~"
        ) from None
    except UnicodeEncodeError:
        impossible = True
    if impossible:
        raise CheckpointError("no file can have this name", file=path)
    return found


def existing_parent(path: Path) -> Path:
    """Returns the nearest existing folder above a path."""
    return next(parent for parent in path.absolute().parents if os.path.exists(parent))


def require_regular(path: str | Path, error: type[UserError] = CheckpointError) -> os.stat_result:
    """Returns the status of a regular file, after following links.

    The file is not opened, so a FIFO or a device cannot block.

    Args:
        path: the path of the file.
        error: the class to raise.

    Raises:
        UserError: the file is missing, unreadable, or not a regular file.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error("it is missing", file=path) from None
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", problem)
        raise error(f"it cannot be read ({reason})", file=path) from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"it is {_kind(found.st_mode)}", file=path, wanted="a regular file")
    if not os.access(path, os.R_OK):
        raise error("it cannot be read (no permission)", file=path)
    return found


def open_regular(path: str | Path, error: type[UserError] = CheckpointError) -> BufferedReader:
    """Opens a regular file for reading; raises as `require_regular` does."""
    require_regular(path, error)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced meanwhile
            os.close(descriptor)
            raise error("it is not a regular file", file=path)
        return os.fdopen(descriptor, "rb")
    except OSError as problem:
        raise error(f"it cannot be read ({problem.strerror})", file=path) from problem


def read_bytes(path: str | Path, most: int = JSON_BYTES) -> bytes:
    """Returns the content of a regular file of at most `most` bytes; raises as `require_regular`
    does, and DamagedError for a larger file."""
    with open_regular(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise CheckpointError(f"it cannot be read ({error.strerror})", file=path) from error
    if len(content) > most:
        raise DamagedError(
            "it is larger than such a file can be", file=path, wanted=f"at most {most} bytes"
        )
    return content


def leads_outside(path: Path, folder: Path) -> bool:
    """Returns whether a file in a checkpoint's folder is a link to somewhere else.

    Files of a snapshot in the hub's cache are links to `../../blobs/<hash>`, which counts as
    inside.
    """
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # the file is missing, or links form a loop
        return False
    blobs = (
        [root.parents[1] / "blobs"]
        if len(root.parents) > 1 and root.parent.name == "snapshots"
        else []
    )
    return not any(target.is_relative_to(home) for home in [root, *blobs])


def require_inside(path: Path, folder: Path) -> None:
    """Raises CheckpointError for a link that leads outside the checkpoint's folder; see
    `leads_outside`."""
    if leads_outside(path, folder):
        raise CheckpointError(
            f"it is a link that leads outside the checkpoint's folder, to {path.resolve()}",
            file=path,
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
