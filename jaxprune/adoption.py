"""Journals without a marker, as version 0.1.0 left them: what in them is provably ours, so that their runs go on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import ownership, schema
from convert.errors import UserError
from convert.files import read_bytes
from convert.ownership import Listed
from convert.schema import Schema
from jaxprune.journal import Journal

IDENTITY, EMPTY, STATES = "run.json", ("lock", "finishing"), "digests.json"


class _Calibration(Schema):
    windows: tuple[int, int]


class Identity(Schema):
    """What run.json said at least.

    Attributes:
        checkpoint: a digest of it.
        computation: dtype of the model's computation.
        seed: of the choice of windows.
        calibration: shape of the windows.
    """

    checkpoint: str
    computation: str
    seed: int
    calibration: _Calibration


def is_journal(folder: Path) -> bool:
    """Whether a folder without a marker is an earlier version's journal."""
    try:
        _identity(folder)
        return True
    except UserError:
        return False


def _identity(folder: Path) -> Identity:
    return schema.read(Identity, folder / IDENTITY)


def adopted(folder: Path) -> tuple[dict[str, Listed], list[str]]:
    """The files that are ours beside those that notes list, and the paths of what is not ours and stays.

    Hidden states are not taken up, only removed in the end: they are computed again.
    """
    entries = Journal(folder).files()
    files = ownership.listed(folder, [IDENTITY])
    for name in EMPTY:
        if (folder / name).is_file() and not (folder / name).is_symlink() and (folder / name).stat().st_size == 0:
            files |= ownership.listed(folder, [name])
    for path in folder.rglob(STATES):
        files |= _states(folder, path, _identity(folder))
    return files, list(ownership.strange(folder, {*entries, *files}))


def _states(folder: Path, path: Path, identity: Identity) -> dict[str, Listed]:
    """The files of kept states, where their digests are right; else nothing."""
    try:
        digests = json.loads(read_bytes(path))
        found = {str((path.parent / name).relative_to(folder)): (name, digest) for name, digest in digests.items()}
    except (UserError, ValueError, AttributeError, TypeError):
        return {}
    files = {}
    for relative, (name, digest) in found.items():
        if Path(name).name != name or not isinstance(digest, str) or not os.path.lexists(path.parent / name):
            return {}
        size = (path.parent / name).lstat().st_size
        ways = (Listed(size=size, sha256=digest, prefix=prefix) for prefix in _prefixes(size, identity))
        proven = next((listed for listed in ways if ownership.unchanged(path.parent / name, listed)), None)
        if proven is None:
            return {}
        files[relative] = proven
    return files | ownership.listed(folder, [str(path.relative_to(folder))])


def _prefixes(size: int, identity: Identity) -> Iterator[str]:
    """What was hashed before states of all windows: their dtype and shape."""
    dtype: Any = np.dtype(identity.computation)
    windows, length = identity.calibration.windows
    width, rest = divmod(size, windows * length * dtype.itemsize)
    if not rest:
        yield f"{dtype.name} {(windows, length, width)};"
