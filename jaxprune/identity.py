"""Whose a journal is: all that decides a run's outcome, and the weights that it met.

What is known at once (options, calibration windows, configuration, names, shapes and dtypes of all tensors) is compared
before any work. Contents are compared as they are read: a run keeps the digest of every tensor beside its journal, and
when it goes on, no tensor may have another. Tensors of layers that are pruned already are read again only where the
system's own account of the files (size, times, inode) has changed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert import Params, Reader, Spec, parts, schema
from convert.checked import CheckedReader, Signature
from jaxprune.models import Model

SCHEMA = 2
WEIGHTS = "weights.json"


class Weights(schema.Schema):
    """What a run knows of its checkpoint's weights.

    Attributes:
        files: `CheckedReader.signature` when they were last known to be the same.
        digests: of the tensors met so far.
    """

    version: Literal[1] = 1
    files: dict[str, list[int]]
    digests: dict[str, str]


class KnownWeights:
    """The digests of a run's tensors, kept beside its journal.

    Args:
        reader: of the checkpoint.
        file: where they are kept.

    Raises:
        ChangedError: a tensor has changed since layers were pruned from it.
    """

    def __init__(self, reader: CheckedReader, file: Path) -> None:
        self._reader, self._file = reader, file
        self._signature: Signature = reader.signature()
        self._kept = 0
        known = schema.read(Weights, file) if file.exists() else None
        reader.remember(known.digests if known else {})
        if known:
            self._kept = len(known.digests)
            reader.require_unchanged(known.files)
            if known.files != self._signature:
                self._kept = 0  # so that the new signature is kept

    def as_json(self) -> str | None:
        """What is to be kept before anything that depends on it; None where that is kept already."""
        if len(self._reader.digests) == self._kept:
            return None
        self._kept = len(self._reader.digests)
        return Weights(files=self._signature, digests=dict(self._reader.digests)).model_dump_json()

    def require_unchanged(self) -> None:
        """Raises ChangedError where a tensor has changed since this run began."""
        self._reader.require_unchanged(self._signature)


def of_run(reader: Reader, model: Model, asked: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """All that decides a run's outcome and is known before it begins, as JSON.

    Args:
        reader: of the dense checkpoint.
        model: of the checkpoint.
        asked: the recipe and what it is applied to, as JSON.
        seed: of the run.
    """
    return {
        "schema": SCHEMA,
        "checkpoint": {"headers": _headers(reader.spec)},
        "model": plain(dataclasses.asdict(model.config)),
        "seed": seed,
        **asked,
    }


def of_version_1(reader: Reader, model: Model, asked: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same as versions before 0.2 wrote it, whose journals are still taken up; `asked` in their form."""
    grouped = parts(reader.spec)
    layers = [part for part in grouped if part.startswith("layers.")]
    content = reader.read([path for part in {layers[0], layers[-1], "norm"} & grouped.keys() for path in grouped[part]])
    shapes = {path: [list(t.shape), t.dtype.name] for path, t in sorted(reader.spec.items())}
    checkpoint = hashlib.sha256((json.dumps(shapes) + _digest(content)).encode()).hexdigest()
    return {"checkpoint": checkpoint, "computation": np.dtype(model.config.dtype).name, "seed": seed, **asked}


def plain(value: Any) -> Any:
    """A value as JSON knows it; sorted items as an object."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value):
            return plain(dict(value))
        return [plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else str(np.dtype(value))


def _headers(spec: Spec) -> str:
    """A digest of all names, shapes and dtypes."""
    shapes = {path: [list(t.shape), t.dtype.name] for path, t in sorted(spec.items())}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _digest(arrays: Params) -> str:
    """The digest of version 1: of arrays in their logical order."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")  # ascontiguousarray makes 1-d arrays of 0-d ones
        whole.update(f"{name} {array.dtype.name} {array.shape};".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
