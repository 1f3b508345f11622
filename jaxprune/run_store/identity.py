"""Whose a run store is: all that decides a run's outcome, and the weights that it met.

What is known at once (options, calibration windows, configuration, names, shapes and dtypes of all
tensors) is compared before any work. Contents are compared as they are read: a run keeps the digest
of every tensor in its store, and when it goes on, no tensor may have another. Tensors of
layers that are pruned already are read again only where the system's own account of the files
(size, times, inode) has changed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import Reader, Spec, parts, schema
from convert.checked import ChangedError, CheckedReader, Signature, digest
from jaxprune.errors import Change
from jaxprune.run_store.opening import AnotherRunError
from jaxprune.run_store.store import STAGES, WEIGHTS, RunStore

SCHEMA = 3
UNREAD = ("transformers_version", "_name_or_path", "architectures", "use_cache")
"""Entries of config.json that decide nothing here."""
log = logging.getLogger(__name__)


class Weights(schema.Schema):
    """What a run store has of its checkpoint's weights, a part in each saved result.

    Attributes:
        files: `CheckedReader.signature` when the tensors were read.
        digests: path -> digest of tensors that were read since the one before.
    """

    files: dict[str, list[int]]
    digests: dict[str, str]


class KnownWeights:
    """The weights that a run has met, held against those that it met before it was stopped.

    Args:
        reader: the reader of the dense checkpoint.
        store: the store of the run; it saves what becomes known.

    Attributes:
        reader: as given.

    Raises:
        AnotherRunError: a tensor has changed since the run met it.
    """

    def __init__(self, reader: CheckedReader, store: RunStore) -> None:
        self.reader, self._store = reader, store
        self._signature = reader.signature()
        saved: list[Weights] = []
        for number in store.names(WEIGHTS):
            found = store.get(f"{WEIGHTS}/{number}")
            if found is None:  # nobody knows any more which weights the results were made of
                log.warning("all that is saved in %s will be made again", store.folder)
                store.drop(*STAGES)
                saved = []
                break
            saved.append(schema.check(Weights, found.figures, file=store.folder, entry=WEIGHTS))
        known = {path: found for one in saved for path, found in one.digests.items()}
        reader.remember(known)
        self._known = set(known)
        if any(one.files != self._signature for one in saved):
            self._require({}, "before this run was stopped it met another tensor there")
        store.newly_known = self._newly_known

    def _newly_known(self) -> dict[str, Any] | None:
        digests = dict(self.reader.digests)
        new = {path: found for path, found in digests.items() if path not in self._known}
        self._known |= new.keys()
        return Weights(files=self._signature, digests=new).model_dump() if new else None

    def require_unchanged(self) -> None:
        """Raises AnotherRunError where a tensor has changed since this process met it."""
        self._require(self._signature, "it changed while the run went on")

    def _require(self, signature: Signature, what: str) -> None:
        try:
            self.reader.require_unchanged(signature)
        except ChangedError as error:
            where = f"{error.file}, from which layers were pruned already"
            raise AnotherRunError(
                f"{what}: give the checkpoint as it was in {where}",
                file=self._store.folder,
                entry=error.entry,
                found=error.found,
                wanted=error.wanted,
                options={"out": Change.OTHER},
            ) from error


def checked(reader: Reader) -> CheckedReader:
    """Returns the reader of a model whose files may be made something of.

    Raises:
        TypeError: it does not look at weights when it reads them.
    """
    if not isinstance(reader, CheckedReader):
        raise TypeError(
            "files are made of a model of jaxprune.load, whose weights are looked at when they are "
            "read"
        )
    return reader


def of_run(
    reader: Reader, config: Mapping[str, Any], dtype: np.dtype, asked: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Returns all that decides a run's outcome and is known before it begins, as JSON.

    Args:
        reader: the reader of the dense checkpoint.
        config: the content of its config.json.
        dtype: the dtype of the computation.
        asked: the recipe and what it is applied to, as JSON.
        seed: the seed of the run.
    """
    return {
        "schema": SCHEMA,
        "checkpoint": {"headers": hashlib.sha256(_headers(reader.spec)).hexdigest()},
        "config.json": {name: value for name, value in config.items() if name not in UNREAD},
        "computation": dtype.name,
        "seed": seed,
        **asked,
    }


def sample(reader: Reader) -> dict[str, str]:
    """Returns the digest of the smallest tensor beside the layers, the final norm: fine-tuned
    checkpoints of the same shapes have others."""
    beside = [
        path
        for part, paths in parts(reader.spec).items()
        if not part.startswith("layers.")
        for path in paths
    ]
    path = min(beside, key=lambda path: math.prod(reader.spec[path].shape))
    return {path: digest(reader.read([path])[path])}


def _headers(spec: Spec) -> bytes:
    """Returns all names, shapes and dtypes, to be digested."""
    return json.dumps(
        {path: [list(t.shape), t.dtype.name] for path, t in sorted(spec.items())}
    ).encode()
