"""Journals without a marker, as version 0.1.0 left them: what in them is provably ours, so that
their runs go on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import ownership, schema
from convert.errors import UserError
from convert.files import read_bytes
from convert.ownership import Listed
from convert.schema import Schema
from jaxprune.pruning.journal import Journal

IDENTITY, EMPTY, STATES = "run.json", ("lock", "finishing"), "digests.json"


class _Calibration(Schema):
    windows: tuple[int, int]


class Identity(Schema):
    """What run.json said at least.

    Attributes:
        checkpoint: a digest of it.
        computation: dtype of the model's computation.
        seed: the seed of the choice of windows.
        calibration: shape of the windows.
    """

    checkpoint: str
    computation: str
    seed: int
    calibration: _Calibration


def is_journal(folder: Path) -> bool:
    """Returns whether a folder without a marker is an earlier version's journal."""
    try:
        _identity(folder)
        return True
    except UserError:
        return False


def _identity(folder: Path) -> Identity:
    return schema.read(Identity, folder / IDENTITY)


class Adopted(NamedTuple):
    """What an earlier version's journal holds beside what its notes list.

    Attributes:
        files: the files that are ours.
        states: the states that are ours too, and not taken up: hidden states are computed again.
        others: paths of what is not ours, and stays.
    """

    files: dict[str, Listed]
    states: dict[str, Listed]
    others: list[str]


def adopted(folder: Path) -> Adopted:
    """Returns what is ours of an earlier version's journal."""
    entries = Journal(folder).files()
    files = ownership.listed(folder, [IDENTITY])
    for name in EMPTY:
        if (
            (folder / name).is_file()
            and not (folder / name).is_symlink()
            and (folder / name).stat().st_size == 0
        ):
            files |= ownership.listed(folder, [name])
    states: dict[str, Listed] = {}
    for path in folder.rglob(STATES):
        states |= _states(folder, path, _identity(folder))
    return Adopted(files, states, list(ownership.strange(folder, {*entries, *files, *states})))


def _states(folder: Path, path: Path, identity: Identity) -> dict[str, Listed]:
    """Returns the files of kept states, where their digests are right; else nothing."""
    try:
        digests = json.loads(read_bytes(path))
        found = {
            str((path.parent / name).relative_to(folder)): (name, digest)
            for name, digest in digests.items()
        }
    except (UserError, ValueError, AttributeError, TypeError):
        return {}
    files = {}
    for relative, (name, digest) in found.items():
        if (
            Path(name).name != name
            or not isinstance(digest, str)
            or not os.path.lexists(path.parent / name)
        ):
            return {}
        size = (path.parent / name).lstat().st_size
        ways = (
            Listed(size=size, sha256=digest, prefix=prefix) for prefix in _prefixes(size, identity)
        )
        proven = next(
            (listed for listed in ways if ownership.unchanged(path.parent / name, listed)), None
        )
        if proven is None:
            return {}
        files[relative] = proven
    return files | ownership.listed(folder, [str(path.relative_to(folder))])


def _prefixes(size: int, identity: Identity) -> Iterator[str]:
    """Yields what was hashed before states of all windows: their dtype and shape."""
    dtype: Any = np.dtype(identity.computation)
    windows, length = identity.calibration.windows
    width, rest = divmod(size, windows * length * dtype.itemsize)
    if not rest:
        yield f"{dtype.name} {(windows, length, width)};"
