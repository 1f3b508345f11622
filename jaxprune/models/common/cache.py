"""What a layer keeps of texts that are generated token by token: keys and values, states."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxprune.models.common.packed_windows import Layout


class Cache(Layout):
    """What a layer keeps of texts, token by token; it takes a cache in the place of a layout.

    The first tokens of all texts come in one window each, after which there is padding; after that
    comes one token of each at a time. What an operation of the layer keeps (keys and values, the
    memory of a recurrence) it finds again by the order in which operations come.

    Args:
        positions: of the tokens that come.
        lengths: tokens of each text in the first window.
        capacity: tokens of the longest text in the end.
        before: what is kept of the tokens before; None: these are the first.

    Attributes:
        lengths, before: as given.
        after: what is kept when the layer returns.
    """

    def __init__(
        self,
        positions: Int[Array, "b t"],
        lengths: Int[Array, "b"],
        capacity: int,
        before: Iterable[Any] | None = None,
    ) -> None:
        nothing = jnp.zeros_like(positions)
        super().__init__(positions, nothing, nothing)
        self.lengths, self._capacity = lengths, capacity
        self.before: list[Any] | None = None if before is None else list(before)
        self.after: list[Any] = []

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def valid(self) -> Bool[Array, "b t"]:
        """Which tokens of the first window are no padding."""
        return self.positions < self.lengths[:, None]

    def take(self) -> Any:
        """Returns what the operation kept that is next in order."""
        assert self.before
        return self.before.pop(0)

    def keep(self, kept: Any) -> None:
        """Keeps arrays for the next tokens."""
        self.after.append(kept)
