"""Tensors checked once each, while they stream by: finite, and the same that a stopped run met
before it stopped."""

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from convert.checkpoint import (
    DerivedReader,
    Params,
    Reader,
    Rounding,
    parts,
    preferred_dtype,
    rounding,
)
from convert.errors import DamagedError, UserError
from convert.names import BESIDE

BLOCK = 2**17
"""Elements that are looked at together: they stay in a processor's cache."""
Signature = dict[str, list[int]]
"""File -> its size, the times of its last changes in nanoseconds, and its inode: equal ones mean
equal content."""


class ChangedError(UserError):
    """A tensor is not what it was when layers were pruned from it."""


class CheckedReader(DerivedReader):
    """A reader whose tensors are known to be finite.

    Args:
        reader: reads them.

    Attributes:
        digests: path -> SHA-256 of each tensor met since `remember` was called, and of those given
            to it.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader, reader.spec)
        self._finite: set[str] = set()
        self._met: set[str] = set()
        self._remembers = False
        self._lock = threading.Lock()  # layers are read in a thread of their own
        self.digests: dict[str, str] = {}

    @property
    def held(self) -> Rounding | None:
        return rounding(self._reader)

    @property
    def save_dtype(self) -> np.dtype | None:
        return preferred_dtype(self._reader)

    def remember(self, known: Mapping[str, str]) -> None:
        """Takes from now on the digest of each tensor, once, and holds it against what is known of
        it.

        Args:
            known: path -> digest, as in `digests`.
        """
        with self._lock:
            self._remembers = True
            self.digests |= known

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory.

        Raises:
            CheckpointError: the files are damaged, or hold NaN or infinity.
            ChangedError: a tensor is another than the one that is known under its name.
        """
        params = self._reader.read(paths)
        with self._lock:
            for path, array in params.items():
                if path not in self._finite:
                    require_finite(path.removeprefix(f"{BESIDE}."), array, self._folder)
                    self._finite.add(path)
                if self._remembers and path not in self._met:
                    self._compare(path, digest(array))
        return params

    @property
    def _folder(self) -> Path | None:
        """Where the files are, for errors."""
        return self.files[0].parent if self.files else None

    def _compare(self, path: str, found: str) -> None:
        if self.digests.setdefault(path, found) != found:
            raise ChangedError(
                "its content is another than when this run pruned layers from it",
                file=self._folder,
                entry=path,
                found=f"sha256 {found[:12]}…",
                wanted=f"sha256 {self.digests[path][:12]}…",
            )
        self._met.add(path)

    def require_unchanged(self, before: Signature) -> None:
        """Reads what is known again where the files are not those of a signature, and compares it.

        Raises:
            ChangedError: a tensor has changed.
        """
        if self.signature() == before:
            return
        self._met.clear()
        for paths in parts(self.spec).values():
            for path in paths:
                # one at a time: none is needed, and an embedding may be large
                if path in self.digests:
                    self.read([path])

    def signature(self) -> Signature:
        """Returns what the system knows of the weights' files, links followed."""
        found = {}
        for path in self.files:
            status = os.stat(path)
            found[str(path.resolve())] = [
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
            ]
        return found


def require_finite(path: str, array: np.ndarray, file: Path | None = None) -> None:
    """Raises DamagedError with the place of the first NaN or infinity."""
    bits = _flat(array).view(f"u{array.itemsize}")
    exponent = {
        2: 0xF800 if array.dtype == np.float16 else 0xFF00,
        4: 0xFF000000,
        8: 0xFFE0000000000000,
    }
    least = exponent[array.itemsize]  # bits of infinity, without the sign
    buffer = np.empty(min(BLOCK, bits.size), bits.dtype)
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        if np.left_shift(block, 1, out=buffer[: block.size]).max() >= least:
            with np.errstate(invalid="ignore"):  # as for NaN of the signalling kind
                wide = np.asarray(array, np.float64)
            place = np.argwhere(~np.isfinite(wide))[0]
            raise DamagedError(
                "it holds a number that is not finite",
                file=file,
                entry=f"{path}{[int(i) for i in place]}",
                found=float(wide[tuple(place)]),
            )


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's dtype, shape, order and bytes, as they lie in memory."""
    order = "C" if array.flags.c_contiguous else "F"
    whole = hashlib.sha256(f"{array.dtype.name} {array.shape} {order};".encode())
    whole.update(_flat(array).view(np.uint8).data)
    return whole.hexdigest()


def _flat(array: np.ndarray) -> Shaped[np.ndarray, "_"]:
    """Returns the elements in the order in which they lie in memory: a kernel is a stored tensor's
    transpose, not a copy."""
    return np.asarray(array if array.flags.c_contiguous else array.T, order="C").reshape(-1)
