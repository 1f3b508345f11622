"""Orbax checkpoints: one Orbax pytree a part (`params/layers.3`), so that a layer is read and
written alone.

`params/<part>` holds the part's params nested as Flax has them; configuration and tokenizer are
beside it.
"""

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from flax import traverse_util
from pydantic import Field

from convert import schema
from convert.assets import check_files
from convert.checkpoint import Params, Spec, part_of, parts, require_written
from convert.consistency import ordered
from convert.errors import CheckpointError, DamagedError, NoRoomError, joined, reason
from convert.files import require_regular
from convert.schema import Schema
from convert.shards import DTYPES
from convert.writing import names, write_json

MARK = "params.json"
MOST_FILES = 10_000
"""Files of a part; Orbax writes about ten."""
MOST_RATIO, FREE_BYTES = 1000, 2**28
"""What a part's arrays may hold: so many bytes, and so many times the bytes that its compressed
files have."""


class _Manifest(Schema):
    """params.json."""

    parts: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,200}(\.[0-9]{1,4})?$")]],
        Field(max_length=10_000),
    ]


class Reader:
    """Reads a folder that this module's Writer wrote.

    Raises:
        CheckpointError: a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.assets = path.resolve()  # Orbax takes no relative path
        found = schema.read(_Manifest, path / MARK).parts
        check_files(path)
        spec: Spec = {}
        problems = []
        for part in found:
            try:
                spec |= self._headers(part)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise DamagedError(f"it is incomplete: {joined(problems)}", file=path)
        self.spec = ordered(spec, path)

    def _headers(self, part: str) -> Spec:
        """Returns the shapes and dtypes of a part's params, checked against its bytes on disk."""
        folder = self.assets / "params" / part
        stored = _size(folder)
        with _reading(folder) as readable:
            tree = _orbax().metadata(readable).metadata
            leaves = {
                f"{part}.{leaf}": jax.ShapeDtypeStruct(tuple(entry.shape), np.dtype(entry.dtype))
                for leaf, entry in traverse_util.flatten_dict(tree, sep=".").items()
            }
        declared = sum(math.prod(t.shape) * t.dtype.itemsize for t in leaves.values())
        if declared > FREE_BYTES + MOST_RATIO * stored:
            raise DamagedError(
                "its arrays are larger than its files can hold", file=folder, found=declared
            )
        if odd := [path for path, t in leaves.items() if t.dtype.name not in DTYPES]:
            raise CheckpointError(
                f"only {', '.join(DTYPES)} can be read", file=folder, entry=odd[0]
            )
        return leaves

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in (self.assets / "params").rglob("*") if path.is_file())

    @staticmethod
    def accepts(path: Path) -> bool:
        return os.path.lexists(path / MARK) and (path / "params").is_dir()

    def read(self, paths: Iterable[str]) -> Params:
        params: Params = {}
        wanted = dict.fromkeys(paths)
        for part in dict.fromkeys(map(part_of, wanted)):
            folder = self.assets / "params" / part
            leaves = {
                path.removeprefix(f"{part}."): np.empty(t.shape, t.dtype)
                for path, t in self.spec.items()
                if part_of(path) == part
            }
            abstract = traverse_util.unflatten_dict(leaves, sep=".")
            _size(folder)
            with _reading(folder) as readable:
                tree = _orbax().load(readable, abstract)
            for leaf, array in traverse_util.flatten_dict(tree, sep=".").items():
                if (path := f"{part}.{leaf}") in wanted:
                    params[path] = array
        return params


class Writer:
    """Writes one Orbax pytree a part."""

    def __init__(self, folder: Path, spec: Spec, assets: Path) -> None:
        del assets  # names are paths here
        self.place, self._parts = folder, parts(spec)
        self._missing = set(self._parts)
        self.files: set[str] = set()

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for part, paths in parts(params).items():
            leaves = {path.removeprefix(f"{part}."): params[path] for path in paths}
            save_tree(self.place.resolve() / "params" / part, leaves)
            self.files |= {f"params/{part}/{name}" for name in names(self.place / "params" / part)}
            self._missing.discard(part)

    def finish(self) -> None:
        require_written(self._missing, self.place)
        write_json(self.place / MARK, {"parts": list(self._parts)})
        self.files.add(MARK)


def save_tree(path: Path, arrays: Params) -> None:
    """Saves arrays as one pytree, which appears at `path` by a rename.

    Args:
        path: absolute.
        arrays: the arrays by dotted path.

    Raises:
        CheckpointError: it cannot be written.
    """
    tree = traverse_util.unflatten_dict(
        {name: np.asarray(a, order="C") for name, a in arrays.items()}, sep="."
    )
    try:
        with _spelled_for_tensorstore(path) as writable, _patient():
            _orbax().save(writable, tree)
    # tensorstore reports a full disk as a ValueError, at length
    except (OSError, ValueError, RuntimeError) as error:
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            raise NoRoomError(f"it cannot be written ({full})", file=path) from error
        raise CheckpointError(f"it cannot be written ({str(error)[:200]})", file=path) from error


def _size(folder: Path) -> int:
    """Returns the bytes of a pytree's files; all that Orbax may open is looked at first, so that
    nothing makes it wait.

    Raises:
        DamagedError: the folder is missing, or something in it is neither a folder nor a regular
            file.
    """
    total, seen = 0, 0
    if not folder.is_dir():
        raise DamagedError("it is missing, or no folder", file=folder)
    for path in folder.rglob("*"):
        if (seen := seen + 1) > MOST_FILES:
            raise DamagedError(f"it has more than {MOST_FILES} files", file=folder)
        if path.is_symlink() or not path.is_dir():
            total += require_regular(path, DamagedError).st_size
    return total


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Path]:
    """Yields the path by which to read; turns what is raised for a damaged pytree, errors of every
    kind, into one."""
    try:
        with _spelled_for_tensorstore(folder) as readable:
            yield readable
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedError(f"it cannot be read ({reason(error)})", file=folder) from error


@contextlib.contextmanager
def _spelled_for_tensorstore(path: Path) -> Iterator[Path]:
    r"""Yields the path, or a link to it where its name would not do: tensorstore takes \ for /, and
    only UTF-8."""
    name = str(path)
    if "\\" not in name and name == name.encode("utf-8", "replace").decode():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jaxprune-link-") as folder:
        link = Path(folder) / "parent"
        link.symlink_to(path.parent)
        yield link / path.name


def _patient() -> Any:
    """Returns the context of a save that outlasts a sleep: Orbax gives its own writes up by the
    clock on the wall."""
    context = _orbax().Context()
    context.asynchronous.timeout_secs = 7 * 24 * 3600
    # which would wait for five minutes at most
    context.asynchronous.create_directories_asynchronously = False
    return context


def _orbax() -> Any:
    # Imported where it is used: it takes seconds, and most runs never need it.
    from orbax.checkpoint import v1

    return v1
