"""Wanda's mask, and the kept weights of each output times the factor that brings its output nearest
to the dense one.

For an output with dense weights w and kept weights v, the error ‖X(w − a·v)‖² is smallest at a =
vᵀHw / vᵀHv, H = XᵀX.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.errors import InputError
from jaxprune.methods import UPDATES, Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import Scalar, masked, matmul
from jaxprune.methods.wanda import select
from jaxprune.sparsity.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """Multiplies the kept weights of each output by one factor."""

    largest: float = dataclasses.field(default=4.0, metadata=UPDATES)
    """The largest factor."""

    def __post_init__(self) -> None:
        if not 0 < self.largest < math.inf:
            raise InputError(f"largest must be finite and positive, not {self.largest}")

    @property
    def per_output(self) -> bool:
        return True

    def prepare(self, gram: Gram) -> Gram:
        return gram

    def solve(self, prepared: Gram, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        norms = jnp.sqrt(jnp.diagonal(prepared))
        mask = select(norms, weight, pattern) if isinstance(pattern, Pattern) else pattern
        kept = masked(mask, weight)
        factors = _factors(prepared, weight, kept, self.largest)
        return Solution(kept * factors[None, :], mask, {"mean_factor": factors.mean()})


@jax.jit
def _factors(gram: Gram, weight: Kernel, kept: Kernel, largest: Scalar) -> Float[Array, "m"]:
    """Returns the factor of each output; 1 where nothing of it is kept."""
    product = matmul(gram, kept)
    norm = jnp.sum(kept * product, axis=0)
    fit = jnp.sum(weight * product, axis=0) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    bounded = jnp.clip(fit, 0, jnp.asarray(largest, fit.dtype))
    return jnp.where(norm > 0, bounded, jnp.ones_like(fit))
