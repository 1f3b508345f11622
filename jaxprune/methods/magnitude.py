"""Magnitude pruning: removes the weights of smallest |W_ij| and leaves the others unchanged."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprune.methods import Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import masked
from jaxprune.sparsity.patterns import Pattern
from jaxprune.sparsity.selection import Selector


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Keeps the largest weights; ignores activations and updates nothing."""

    @property
    def per_output(self) -> bool:
        return False

    def prepare(self, gram: Gram) -> None:
        del gram  # unused

    def solve(self, prepared: None, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        del prepared  # unused
        mask = (
            _select(weight, pattern.selector(weight.shape))
            if isinstance(pattern, Pattern)
            else pattern
        )
        return Solution(masked(mask, weight), mask, {})


@jax.jit
def _select(weight: Kernel, selector: Selector) -> Mask:
    return selector(jnp.abs(weight))
