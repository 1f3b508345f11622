"""What a checkpoint is to everything else: arrays by path, in parts; what reads one, and what
writes one."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from convert.errors import CheckpointError, joined
from convert.names import EMBEDDINGS, HEADS

Params = dict[str, np.ndarray]
Spec = dict[str, jax.ShapeDtypeStruct]
Rounding = Callable[[str, np.ndarray], np.ndarray]
"""A param's path and array -> what a format holds of it."""


@runtime_checkable
class Reader(Protocol):
    """A checkpoint that is read lazily.

    Attributes:
        spec: shape and stored dtype of every parameter, from headers alone.
        assets: a folder with all that is not weights: config.json, the tokenizer's files, ...

    One of a format that rounds has a method `held` besides; see `rounding`. One of a format that
    decodes its weights to a wider dtype has a `save_dtype` besides; see `preferred_dtype`. One that
    reads the weights of another model than `assets` describes has `changes`; see `config_changes`.
    """

    spec: Spec

    @property
    def assets(self) -> Path: ...

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        ...

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory.

        Raises:
            CheckpointError: the files are damaged.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """A checkpoint that is written part by part, in any order; nothing but the last part is held in
    memory.

    Args:
        place: where it is made: an empty folder; or a file that is not there yet, of a format whose
            Writer has a `single_file` that is true.
        spec: the shapes and dtypes of what will be written.
        assets: a folder with configuration and tokenizer. They are copied beside what is written in
            a folder.

    Attributes:
        place: as given.
        files: relative paths of the files that it wrote in its folder later than at its start.
    """

    place: Path
    files: set[str]

    def __init__(self, place: Path, spec: Spec, assets: Path) -> None: ...

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        """Writes whole parts (a part is the embedding, a decoder layer, the final norm or the
        head)."""
        ...

    def finish(self) -> None:
        """Raises CheckpointError if a parameter of the spec was never written."""
        ...


class DerivedReader:
    """A reader of another one's checkpoint, with its files and assets.

    Args:
        reader: reads the checkpoint.
        spec: shapes and dtypes of what this one reads.
        changes: entries of config.json that have other values for what this one reads.
    """

    def __init__(
        self, reader: Reader, spec: Spec, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._reader, self.spec = reader, spec
        self.changes = {**config_changes(reader), **changes}

    @property
    def assets(self) -> Path:
        return self._reader.assets

    @property
    def files(self) -> list[Path]:
        return self._reader.files


class RenamedReader(DerivedReader):
    """Reads some params of another reader's checkpoint, under other paths.

    Args:
        reader: reads the checkpoint.
        paths: path of a param here -> its path there. Params that it does not name are left out.
        changes: entries of config.json that have other values for what this one reads.
    """

    def __init__(
        self,
        reader: Reader,
        paths: Mapping[str, str],
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        spec = {path: reader.spec[theirs] for path, theirs in paths.items()}
        super().__init__(reader, spec, changes)
        self._paths = paths

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory; errors as the reader's."""
        wanted = {path: self._paths[path] for path in paths}
        whole = self._reader.read(wanted.values())
        return {path: whole[theirs] for path, theirs in wanted.items()}


def rounding(reader: Reader) -> Rounding | None:
    """Returns what a reader's format makes of an array, by the param's path; None: it holds every
    array as it is."""
    return getattr(reader, "held", None)


def config_changes(reader: Reader) -> Mapping[str, Any]:
    """Returns the entries of config.json that have other values for what a reader reads."""
    return getattr(reader, "changes", {})


def preferred_dtype(reader: Reader) -> np.dtype | None:
    """Returns the dtype in which results of a reader's checkpoint are stored; None: each param in
    its own."""
    return getattr(reader, "save_dtype", None)


def disk_bytes(reader: Reader) -> int:
    """Returns the bytes of the files that hold a checkpoint's weights."""
    return sum(file.stat().st_size for file in reader.files)


def parameters(spec: Spec) -> int:
    """Returns how many numbers the params of a checkpoint are."""
    return sum(tensor.size for tensor in spec.values())


def transposed(path: str, array: np.ndarray) -> np.ndarray:
    """Returns a param as its tensor has it, or the reverse: a kernel is [in, out], its tensor
    [out, in]; all others are the same."""
    return array.T if path.endswith(".kernel") else array


def transposed_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what `transposed` returns."""
    return shape[::-1] if path.endswith(".kernel") else shape


def require_written(missing: Iterable[str], place: Path) -> None:
    """Raises CheckpointError where tensors or parts of a file or folder were never written."""
    if names := sorted(missing):
        raise CheckpointError(f"it is incomplete, never written: {joined(names)}", file=place)


def part_of(path: str) -> str:
    """Returns the part that a parameter belongs to: `layers.3`, or a module outside the layers such
    as `embed_tokens`."""
    first, _, rest = path.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first


def parts(spec: Iterable[str]) -> dict[str, list[str]]:
    """Returns part -> its parameters' paths, in reading order: embedding, layers by number, final
    norm, head."""
    grouped: dict[str, list[str]] = {}
    for path in spec:
        grouped.setdefault(part_of(path), []).append(path)

    def order(part: str) -> tuple[int, int, str]:
        first, _, number = part.partition(".")
        rank = 0 if first in EMBEDDINGS else 1 if first == "layers" else 3 if first in HEADS else 2
        return rank, int(number) if re.fullmatch("[0-9]{1,9}", number) else 0, part

    return {part: grouped[part] for part in sorted(grouped, key=order)}
