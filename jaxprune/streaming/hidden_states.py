"""Hidden states that live on the host between layers, and visit the device a few windows at a time.

On the host they are in memory, or in files that are mapped into memory. Of mapped states only what is being worked on
is in memory: rows are copied out of them, and let go at once.
"""

import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Shaped

from jaxprune.errors import Change, InputError
from jaxprune.sharding import ONE_DEVICE, Devices, fetch

TOKENS_PER_BATCH = {"cpu": 1024, "gpu": 16384, "tpu": 16384}
"""Tokens on a device at a time. On a CPU, what fits its cache: four times as many take 1.2 times as long a token."""
BLOCK_BYTES = 2**26
"""Bytes of states that are copied or written out at a time."""


class HiddenStates:
    """Hidden states [windows, length, width] in the model's dtype, on the host, updated in place.

    Args:
        shape: [windows, length, width].
        dtype: the dtype of the states.
        batch: windows on a device at a time; where there is one device it must divide the number of windows, so that
            every step has one shape and compiles once.
        devices: the devices that they visit.
        folder: where they are kept in a file; None: in memory. The file has no name, so that nothing is left of it
            however the process ends.

    Attributes:
        array: the states. What reads or writes much of them does so by the methods, which let mapped memory go.

    Raises:
        InputError: the disk has no room for them.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        batch: int,
        devices: Devices = ONE_DEVICE,
        folder: Path | None = None,
    ) -> None:
        if devices.count == 1 and shape[0] % batch:
            raise ValueError(f"{batch} does not divide {shape[0]} windows")
        self._batch, self._devices, self._folder = batch, devices, folder
        self._map: mmap.mmap | None = None
        if folder:
            self._map = _mapped(folder, int(np.prod(shape)) * dtype.itemsize)
            self.array = np.frombuffer(self._map, dtype).reshape(shape)
        else:
            self.array = np.empty(shape, dtype)

    def slices(self) -> list[slice]:
        """Returns the rows of each batch.

        A batch is as many windows as all devices take at a time; what is left of them is split as far as it can be, so
        that there are at most three shapes to compile.
        """
        windows, step = len(self.array), self._batch * self._devices.count
        rest = windows % step
        cuts = [*range(0, windows - rest, step), windows - rest, windows - rest % self._devices.count, windows]
        return [slice(start, end) for start, end in itertools.pairwise(cuts) if start < end]

    def read(self, rows: slice | np.ndarray) -> Shaped[np.ndarray, "r t d"]:
        """Returns some windows: a view where the states are in memory and the rows a slice, else a copy."""
        found = self.array[rows]
        if self._map:
            found = found.copy()
            self.release()
        return found

    def write(self, rows: slice, values: Shaped[np.ndarray, "r t d"]) -> None:
        """Sets some windows."""
        self.array[rows] = values
        self.release()

    def release(self) -> None:
        """Lets mapped memory go; what it holds is in the file, or in the system's cache of it."""
        if self._map:
            self._map.madvise(mmap.MADV_DONTNEED)

    def batch(self, rows: slice) -> jax.Array:
        """Puts some windows on the device."""
        return self._devices.shard_first(self.read(rows))

    def batches(self) -> Iterator[jax.Array]:
        """Yields the states of all windows in order, batch by batch, on the device."""
        for rows in self.slices():
            yield self.batch(rows)

    def blocks(self) -> Iterator[memoryview]:
        """Yields the bytes of all states, to be read or written, some windows at a time."""
        step = max(1, BLOCK_BYTES // max(1, self.array[:1].nbytes))
        for start in range(0, len(self.array), step):
            yield self.array[start : start + step].reshape(-1).view(np.uint8).data
            self.release()

    def copy(self) -> "HiddenStates":
        """Returns states of their own with the same content."""
        other = HiddenStates(self.array.shape, self.array.dtype, self._batch, self._devices, self._folder)
        for target, source in zip(other.blocks(), self.blocks(), strict=True):
            target[:] = source
        return other

    def replace(self, step: Callable[[slice], jax.Array]) -> None:
        """Sets each batch of rows to what `step` computes for it.

        A result is copied to the host while the next one is computed.
        """
        pending: tuple[slice, jax.Array] | None = None
        for rows in self.slices():
            result = step(rows)
            result.copy_to_host_async()
            if pending:
                self.write(pending[0], fetch(pending[1]))
            pending = rows, result
        if pending:
            self.write(pending[0], fetch(pending[1]))

    def update(self, step: Callable[[jax.Array, slice], jax.Array]) -> None:
        """Replaces each batch x of rows by step(x, rows)."""
        self.replace(lambda rows: step(self.batch(rows), rows))


def _mapped(folder: Path, size: int) -> mmap.mmap:
    """Returns a file without a name, mapped into memory. It takes its room at once: a later lack would kill the
    process."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"cannot keep {size / 2**30:.2f} GiB of hidden states here ({error.strerror})",
            file=folder,
            options={"scratch": Change.OTHER, "nsamples": Change.LOWER, "seqlen": Change.LOWER},
        ) from error


def tokens_per_batch() -> int:
    """Returns how many tokens are on a device at a time."""
    return TOKENS_PER_BATCH.get(jax.default_backend(), 4096)


def batch_size(windows: int, length: int, tokens: int | None = None, devices: int = 1) -> int:
    """Returns the most windows on a device at a time that divide all of them and keep a batch near a number of tokens.

    Several devices need not divide them: see `HiddenStates.slices`.

    Args:
        windows: the number of windows in all.
        length: tokens of a window.
        tokens: the number of tokens of a batch; None: what suits the device.
        devices: number of devices.
    """
    most = max(1, (tokens or tokens_per_batch()) // length)
    if devices > 1:
        return max(1, min(most, windows // devices))
    return max(size for size in range(1, min(most, windows) + 1) if windows % size == 0)
