"""Hidden states that live on the host between layers, and visit the device a few windows at a time."""

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxprune import devices

TOKENS_PER_BATCH = {"cpu": 1024, "gpu": 16384, "tpu": 16384}
"""On CPU, what fits its cache: four times as many take 1.2 times as long a token."""


class HiddenStates:
    """[windows, length, width] in the model's dtype, in host memory, updated in place.

    Args:
        shape: [windows, length, width].
        dtype: of the states.
        batch: windows on a device at a time; where there is one device it must divide the number of windows, so that
            every step has one shape and compiles once.

    Attributes:
        array: the states; to be read only.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype, batch: int) -> None:
        if devices.number() == 1 and shape[0] % batch:
            raise ValueError(f"{batch} does not divide {shape[0]} windows")
        self.array = np.empty(shape, dtype)
        self._batch = batch

    def slices(self) -> list[slice]:
        """The batches: as many windows as all devices take at a time, then what is left of them, split as far as it can
        be, so that there are at most three shapes to compile."""
        windows, step = len(self.array), self._batch * devices.number()
        rest = windows % step
        cuts = [*range(0, windows - rest, step), windows - rest, windows - rest % devices.number(), windows]
        return [slice(start, end) for start, end in itertools.pairwise(cuts) if start < end]

    def batches(self) -> Iterator[jax.Array]:
        """The states of all windows in order, batch by batch, on the device."""
        for rows in self.slices():
            yield devices.by_windows(self.array[rows])

    def replace(self, step: Callable[[slice], jax.Array]) -> None:
        """Sets each batch of rows to what `step` computes for it.

        A result is copied to the host while the next one is computed.
        """
        pending: tuple[slice, jax.Array] | None = None
        for rows in self.slices():
            result = step(rows)
            result.copy_to_host_async()
            if pending:
                self.array[pending[0]] = devices.fetch(pending[1])
            pending = rows, result
        if pending:
            self.array[pending[0]] = devices.fetch(pending[1])

    def update(self, step: Callable[[jax.Array, slice], jax.Array]) -> None:
        """Replaces each batch x of rows by step(x, rows)."""
        self.replace(lambda rows: step(devices.by_windows(self.array[rows]), rows))


def tokens_per_batch() -> int:
    """Tokens on the device at a time."""
    return TOKENS_PER_BATCH.get(jax.default_backend(), 4096)


def batch_size(windows: int, length: int, tokens: int | None = None) -> int:
    """The most windows on a device at a time that divide all of them and keep a batch near a number of tokens.

    Several devices need not divide them: see `HiddenStates.slices`.

    Args:
        windows: in all.
        length: tokens of a window.
        tokens: of a batch; None: what suits the device.
    """
    most = max(1, (tokens or tokens_per_batch()) // length)
    if devices.number() > 1:
        return max(1, min(most, windows // devices.number()))
    return max(size for size in range(1, min(most, windows) + 1) if windows % size == 0)
