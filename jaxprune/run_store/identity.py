"""The identity of a run: everything that decides its outcome.

Options, calibration windows, configuration, and the names, shapes and dtypes of all tensors are
compared before any work. Contents are compared when they are read: the store has the digest of
every tensor, and a resumed run refuses a tensor with another digest. Tensors of pruned layers are
read again only if size, times or inode of their files have changed.
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
"""Entries of config.json that do not change the outcome."""
log = logging.getLogger(__name__)


class Weights(schema.Schema):
    """Digests of a checkpoint's weights, as one saved result has them.

    Attributes:
        files: `CheckedReader.signature` when the tensors were read.
        digests: path -> digest, of the tensors read since the previous saved result.
    """

    files: dict[str, list[int]]
    digests: dict[str, str]


class SavedDigests:
    """The digests of the dense weights that a run has read, compared with those saved in its store.

    Args:
        reader: the reader of the dense checkpoint.
        store: the store of the run; it saves new digests.

    Attributes:
        reader: as given.

    Raises:
        AnotherRunError: a tensor has changed since the run read it.
    """

    def __init__(self, reader: CheckedReader, store: RunStore) -> None:
        self.reader, self._store = reader, store
        self._signature = reader.signature()
        saved: list[Weights] = []
        for number in store.names(WEIGHTS):
            found = store.get(f"{WEIGHTS}/{number}")
            if found is None:  # the weights that the results were made from are unknown
                log.warning("all that is saved in %s will be made again", store.folder)
                store.drop(*STAGES)
                saved = []
                break
            saved.append(schema.check(Weights, found.figures, file=store.folder, entry=WEIGHTS))
        known = {path: found for one in saved for path, found in one.digests.items()}
        reader.remember(known)
        self._known = set(known)
        if any(one.files != self._signature for one in saved):
            self._require({}, "the tensor has changed since this run was stopped")
        store.new_digests = self._new_digests

    def _new_digests(self) -> dict[str, Any] | None:
        digests = dict(self.reader.digests)
        new = {path: found for path, found in digests.items() if path not in self._known}
        self._known |= new.keys()
        return Weights(files=self._signature, digests=new).model_dump() if new else None

    def require_unchanged(self) -> None:
        """Raises AnotherRunError if a tensor has changed since this process read it."""
        self._require(self._signature, "the tensor changed during the run")

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
    """Returns a model's reader, which must check weights when it reads them.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(reader, CheckedReader):
        raise TypeError(
            "open the model with jaxprune.load: only its reader checks weights when it reads them"
        )
    return reader


def of_run(
    reader: Reader, config: Mapping[str, Any], dtype: np.dtype, asked: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Returns the identity of a run as JSON, without the contents of tensors.

    Args:
        reader: the reader of the dense checkpoint.
        config: the content of its config.json.
        dtype: the dtype of the computation.
        asked: the recipe and its inputs, as JSON.
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
    """Returns the digest of the smallest tensor outside the layers, the final norm. It differs
    between fine-tuned checkpoints of the same shapes."""
    beside = [
        path
        for part, paths in parts(reader.spec).items()
        if not part.startswith("layers.")
        for path in paths
    ]
    path = min(beside, key=lambda path: math.prod(reader.spec[path].shape))
    return {path: digest(reader.read([path])[path])}


def _headers(spec: Spec) -> bytes:
    """Returns the names, shapes and dtypes of all tensors as bytes."""
    return json.dumps(
        {path: [list(t.shape), t.dtype.name] for path, t in sorted(spec.items())}
    ).encode()
