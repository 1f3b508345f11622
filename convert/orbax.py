"""Orbax checkpoints: one Orbax pytree a part (`params/layers.3`), so that a layer is read and written alone.

`params/<part>` holds the part's params nested as Flax has them; configuration and tokenizer are beside it.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from convert import CheckpointError, Params, Spec, part_of, parts
from convert.ownership import names, write_text

MARK = "params.json"


class Reader:
    """Reads a folder that this module's Writer wrote.

    Raises:
        CheckpointError: a part is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path
        try:
            found = json.loads((path / MARK).read_text())["parts"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / MARK} is damaged: convert the checkpoint again") from error
        self.spec: Spec = {}
        problems = []
        for part in found:
            try:
                tree = _orbax().metadata(path / "params" / part).metadata
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"{part}: {error}")
                continue
            for leaf, entry in traverse_util.flatten_dict(tree, sep=".").items():
                self.spec[f"{part}.{leaf}"] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        if problems:
            raise CheckpointError(f"{path} is incomplete; convert it again:\n  " + "\n  ".join(problems[:20]))

    @property
    def assets(self) -> Path:
        return self._folder

    @staticmethod
    def accepts(path: Path) -> bool:
        return (path / MARK).is_file()

    def read(self, paths: Iterable[str]) -> Params:
        params: Params = {}
        wanted = dict.fromkeys(paths)
        for part in dict.fromkeys(map(part_of, wanted)):
            abstract = traverse_util.unflatten_dict(
                {
                    leaf.removeprefix(f"{part}."): np.empty(t.shape, t.dtype)
                    for leaf, t in self.spec.items()
                    if part_of(leaf) == part
                },
                sep=".",
            )
            try:
                tree = _orbax().load(self._folder / "params" / part, abstract)
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"cannot read {part} of {self._folder}: {error}") from error
            for leaf, array in traverse_util.flatten_dict(tree, sep=".").items():
                if f"{part}.{leaf}" in wanted:
                    params[f"{part}.{leaf}"] = array
        return params


class Writer:
    """Writes one Orbax pytree a part."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.folder, self._parts = folder, parts(spec)
        self._missing = set(self._parts)
        self.files: set[str] = set()

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        grouped: dict[str, dict[str, np.ndarray]] = {}
        for path, array in params.items():
            part = part_of(path)
            grouped.setdefault(part, {})[path.removeprefix(f"{part}.")] = array
        for part, leaves in grouped.items():
            save_tree(self.folder.resolve() / "params" / part, leaves)
            self.files |= {f"params/{part}/{name}" for name in names(self.folder / "params" / part)}
            self._missing.discard(part)

    def finish(self) -> None:
        if self._missing:
            raise CheckpointError(f"the checkpoint is incomplete, never written: {', '.join(sorted(self._missing))}")
        write_text(self.folder / MARK, json.dumps({"parts": list(self._parts)}, indent=2) + "\n")
        self.files.add(MARK)


def save_tree(path: Path, arrays: Params) -> None:
    """Saves arrays as one pytree, which appears at `path` by a rename; what was there is replaced.

    Where a run has several processes all of them must call it: Orbax makes them wait for each other.

    Args:
        path: absolute.
        arrays: by dotted path.

    Raises:
        CheckpointError: it cannot be written.
    """
    tree = traverse_util.unflatten_dict({name: np.asarray(a, order="C") for name, a in arrays.items()}, sep=".")
    try:
        _orbax().save(path, tree, overwrite=True)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore reports a full disk as a ValueError, at length
        full = os.strerror(errno.ENOSPC)
        reason = full if full in str(error) else str(error)[:200]
        raise CheckpointError(f"cannot write {path}: {reason}; free some space, then run again") from error


def load_tree(path: Path) -> Params:
    """The arrays that `save_tree` saved, by dotted path.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        tree = _orbax().load(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error)[:200]}") from error
    return {name: np.asarray(array) for name, array in traverse_util.flatten_dict(tree, sep=".").items()}


def _orbax() -> Any:
    # Imported where it is used: it takes seconds, and most runs never need it.
    from orbax.checkpoint import v1

    return v1
