"""How several texts lie in one window."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Layout:
    """How several texts lie in one window, and how some of them share their beginning.

    A group is a common beginning and its continuations, one after the other. A token sees the
    tokens before it of its own continuation and of the beginning of its group, as if its text stood
    alone.

    Attributes:
        positions: the positions of each token in its own text, from 0.
        group: number of its group in the window.
        branch: number of its continuation from 1; 0 is the common beginning.
    """

    positions: Int[Array | np.ndarray, "b t"]
    group: Int[Array | np.ndarray, "b t"]
    branch: Int[Array | np.ndarray, "b t"]

    @property
    def capacity(self) -> int:
        """Tokens that the longest text may have."""
        return self.positions.shape[1]
