"""Hidden states that live on the host between layers, and visit the device a few windows at a time.

On the host they are in memory, or in files that are mapped into memory. Of mapped states only what
is being worked on is in memory: rows are copied out of them, and let go at once.
"""

import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, Shaped

from convert.errors import NoRoomError
from jaxprune import hardware
from jaxprune.errors import Change
from jaxprune.sharding import ONE_DEVICE, Devices, fetch

EVERY = -1
"""The owner of windows that all processes keep."""


class HiddenStates:
    """Hidden states [windows, length, width] in the model's dtype, on the host, updated in place.

    Of several processes each keeps the windows that its devices are given, and those that all
    devices are given.

    Args:
        shape: [windows, length, width].
        dtype: the dtype of the states.
        batch: windows on a device at a time; where there is one device it must divide the number of
            windows, so that every step has one shape and compiles once.
        devices: the devices that they visit.
        folder: where they are kept in a file; None: in memory. The file has no name, so that
            nothing is left of it however the process ends.

    Attributes:
        shape, dtype: of all states.
        array: those that this process keeps. What reads or writes much of them does so by the
            methods, which let mapped memory go.

    Raises:
        NoRoomError: the disk has no room for them.
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
        self.shape, self.dtype = shape, dtype
        self._batch, self._devices, self._folder = batch, devices, folder
        self._map: mmap.mmap | None = None
        self._owners = np.concatenate([np.zeros(0, int), *map(self._owners_of, self.slices())])
        kept = np.isin(self._owners, (jax.process_index(), EVERY))
        self._place = np.where(kept, np.cumsum(kept) - 1, -1)
        own = int(kept.sum()), *shape[1:]
        if folder:
            self._map = _mapped(folder, math.prod(own) * dtype.itemsize)
            self.array = np.frombuffer(self._map, dtype).reshape(own)
        else:
            self.array = np.empty(own, dtype)

    def slices(self) -> list[slice]:
        """Returns the rows of each batch.

        A batch is as many windows as all devices take at a time; what is left of them is split as
        far as it can be, so that there are at most three shapes to compile.
        """
        windows, step = self.shape[0], self._batch * self._devices.count
        rest = windows % step
        cuts = [
            *range(0, windows - rest, step),
            windows - rest,
            windows - rest % self._devices.count,
            windows,
        ]
        return [slice(start, end) for start, end in itertools.pairwise(cuts) if start < end]

    def _owners_of(self, rows: slice) -> Int[np.ndarray, "r"]:
        """Returns the process that keeps each row of a batch; `EVERY`: all do."""
        count, processes = rows.stop - rows.start, self._devices.processes
        if count % len(processes):
            return np.full(count, EVERY)
        return np.repeat(processes, count // len(processes))

    def read(self, rows: slice | np.ndarray) -> Shaped[np.ndarray, "r t d"]:
        """Returns some windows: a view where the states are in memory and the rows a slice, else a
        copy.

        All processes have to ask for them.
        """
        if jax.process_count() > 1:
            return self._gathered(rows, lambda own: self.array[own])
        found = self.array[rows]
        if self._map:
            found = found.copy()
            self.release()
        return found

    def pick(
        self, rows: Int[np.ndarray, "n"], columns: Int[np.ndarray, "n"]
    ) -> Shaped[np.ndarray, "n d"]:
        """Returns single tokens' states: those of the n-th row and column. All processes have to
        ask for them."""
        if jax.process_count() > 1:
            return self._gathered(
                rows, lambda own: self.array[own, columns[self._place[rows] >= 0]]
            )
        found = self.array[rows, columns]
        self.release()
        return found

    def _gathered(
        self, rows: slice | np.ndarray, own: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Returns what `own` returns of this process's rows for the rows of all."""
        place, owners = self._place[rows], self._owners[rows]
        here = own(place[place >= 0])
        found = np.zeros((len(place), *here.shape[1:]), self.dtype)
        found[place >= 0] = here
        self.release()
        every = multihost_utils.process_allgather(found)
        return every[np.where(owners == EVERY, 0, owners), np.arange(len(place))]

    def write(self, rows: slice, values: Shaped[np.ndarray, "r t d"]) -> None:
        """Sets some windows, of which each process takes its own."""
        place = self._place[rows]
        if jax.process_count() > 1:
            self.array[place[place >= 0]] = values[place >= 0]
        else:
            self.array[rows] = values
        self.release()

    def _store(self, rows: slice, values: jax.Array) -> None:
        """Sets some windows to what lies on this process's devices.

        JAX may read the windows where they lie on the host, and of windows that all devices were
        given one device's result is enough for `fetch`: the others may not have read theirs yet.
        """
        jax.block_until_ready(values)
        if jax.process_count() > 1:
            for shard in self._devices.shard_first(values).addressable_shards:
                self.array[self._place[rows][shard.index[0]]] = np.asarray(shard.data)
            self.release()
        else:
            self.write(rows, fetch(values))

    def release(self) -> None:
        """Lets mapped memory go; what it holds is in the file, or in the system's cache of it."""
        if self._map:
            self._map.madvise(mmap.MADV_DONTNEED)

    def batch(self, rows: slice) -> jax.Array:
        """Puts some windows on the device."""
        if jax.process_count() == 1:
            return self._devices.shard_first(self.read(rows))
        shape, place = (rows.stop - rows.start, *self.shape[1:]), self._place[rows]
        found = self._devices.assemble_first(
            shape, self.dtype, lambda some: self.array[place[some]]
        )
        self.release()
        return found

    def batches(self) -> Iterator[jax.Array]:
        """Yields the states of all windows in order, batch by batch, on the device."""
        for rows in self.slices():
            yield self.batch(rows)

    def copy(self) -> "HiddenStates":
        """Returns states of their own with the same content."""
        other = HiddenStates(self.shape, self.dtype, self._batch, self._devices, self._folder)
        for start in range(0, len(self.array), self._batch):
            other.array[start : start + self._batch] = self.array[start : start + self._batch]
            other.release()
            self.release()
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
                self._store(*pending)
            pending = rows, result
        if pending:
            self._store(*pending)

    def update(self, step: Callable[[jax.Array, slice], jax.Array]) -> None:
        """Replaces each batch x of rows by step(x, rows)."""
        self.replace(lambda rows: step(self.batch(rows), rows))


def _mapped(folder: Path, size: int) -> mmap.mmap:
    """Returns a file without a name, mapped into memory. It takes its room at once: a later lack
    would kill the process."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise NoRoomError(
            f"cannot keep {size / 2**30:.2f} GiB of hidden states here ({error.strerror})",
            file=folder,
            options={"scratch": Change.OTHER, "nsamples": Change.LOWER, "seqlen": Change.LOWER},
        ) from error


def batch_size(windows: int, length: int, tokens: int | None = None, devices: int = 1) -> int:
    """Returns the most windows on a device at a time that divide all of them and keep a batch near
    a number of tokens.

    Several devices need not divide them: see `HiddenStates.slices`.

    Args:
        windows: the number of windows in all.
        length: tokens of a window.
        tokens: the number of tokens of a batch; None: what suits the device.
        devices: number of devices.
    """
    most = max(1, (tokens or hardware.current().tokens_per_batch) // length)
    if devices > 1:
        return max(1, min(most, windows // devices))
    return max(size for size in range(1, min(most, windows) + 1) if windows % size == 0)
