"""Wanda: removes the smallest |W_ij|·‖X_i‖₂ of each output and leaves the other weights unchanged.

References:
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024
    (arXiv 2306.11695).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.methods import Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import masked
from jaxprune.sparsity.patterns import Pattern
from jaxprune.sparsity.selection import Selector


@dataclasses.dataclass(frozen=True)
class Wanda:
    """Scores weights by magnitude times the norm of their input; updates nothing."""

    @property
    def per_output(self) -> bool:
        return True

    def prepare(self, gram: Gram) -> Float[Array, "n"]:
        """Returns the norms ‖X_i‖₂ of the inputs."""
        return jnp.sqrt(jnp.diagonal(gram))

    def solve(
        self, prepared: Float[Array, "n"], weight: Kernel, pattern: Pattern | Mask
    ) -> Solution:
        mask = select(prepared, weight, pattern) if isinstance(pattern, Pattern) else pattern
        return Solution(masked(mask, weight), mask, {})


def select(norms: Float[Array, "n"], weight: Kernel, pattern: Pattern) -> Mask:
    """Returns Wanda's mask of a kernel. Methods that only update weights use it if no mask is
    given."""
    return _select(norms, weight, pattern.selector(weight.shape))


@jax.jit
def _select(norms: Float[Array, "n"], weight: Kernel, selector: Selector) -> Mask:
    return selector(jnp.abs(weight) * norms[:, None])
