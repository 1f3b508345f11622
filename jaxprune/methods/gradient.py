r"""Gradient descent on the kept weights, by Adam or SGD: the baselines for ADMM.

Minimises tr((W − W₀)ᵀ G (W − W₀)) over W that are zero outside a mask, in ADMM's coordinates
(scaled and damped, see `admm`). The gradient is 2·M ∘ (GW − B) with B = GW₀. Weights are divided by
their root mean square, so a learning rate means the same for every kernel and any number of tokens.

References:
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv 1412.6980).
    Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024 (arXiv
    2401.02938), section 4.1.
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from jaxprune.errors import InputError
from jaxprune.methods import UPDATES, Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import Scalar, Scaled, masked, matmul, precondition
from jaxprune.methods.wanda import select
from jaxprune.sparsity.patterns import Pattern

Optimizer = Literal["adam", "sgd"]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Updates the kept weights by gradient descent.

    It starts from the masked dense weights, under Wanda's mask if none is given.
    """

    optimizer: Optimizer = dataclasses.field(default="adam", metadata=UPDATES)
    """Optimizer: Adam with optax's defaults, or plain gradient descent."""
    steps: int = dataclasses.field(default=100, metadata=UPDATES)
    """Number of steps, each with the full gradient."""
    learning_rate: float = dataclasses.field(default=0.01, metadata=UPDATES)
    """Learning rate, relative to the root mean square of the weights. SGD diverges above 1 over the
    largest eigenvalue of the scaled Gram matrix."""
    damping: float = dataclasses.field(default=0.1, metadata=UPDATES)
    """Ridge towards the dense weights, as a fraction of the mean diagonal of the scaled Gram
    matrix."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise InputError(f"{self.optimizer!r} is not one of adam, sgd")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be finite and positive, not {self.learning_rate}")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"damping must be finite and not negative, not {self.damping}")

    @property
    def per_output(self) -> bool:
        return True

    def prepare(self, gram: Gram) -> Scaled:
        return precondition(gram, self.damping)

    def solve(self, prepared: Scaled, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        mask = select(prepared.scale, weight, pattern) if isinstance(pattern, Pattern) else pattern
        return _descend(prepared, weight, mask, self.steps, self.learning_rate, self.optimizer)


@partial(jax.jit, static_argnames="optimizer")
def _descend(
    prepared: Scaled,
    weight: Kernel,
    mask: Mask,
    steps: int | Int[Array, ""],
    learning_rate: Scalar,
    optimizer: Optimizer,
) -> Solution:
    scale = prepared.scale[:, None]
    dense = scale * weight
    unit = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(dense))), jnp.finfo(dense.dtype).tiny)
    dense = dense / unit
    target = matmul(prepared.gram, dense)
    descent = getattr(optax, optimizer)(jnp.asarray(learning_rate, dense.dtype))

    def step(_: int | Array, state: tuple[Kernel, optax.OptState]) -> tuple[Kernel, optax.OptState]:
        kept, memory = state
        gradient = 2 * masked(mask, matmul(prepared.gram, kept) - target)
        # Adam's bias correction mixes integers and floats
        with jax.numpy_dtype_promotion("standard"):
            change, memory = descent.update(gradient, memory)
        return kept + change, memory

    kept = masked(mask, dense)
    kept, _ = lax.fori_loop(0, steps, step, (kept, descent.init(kept)))
    slope = jnp.linalg.norm(masked(mask, matmul(prepared.gram, kept) - target))
    gradient = slope / jnp.maximum(jnp.linalg.norm(target), jnp.finfo(dense.dtype).tiny)
    return Solution(kept * unit / scale, mask, {"gradient": gradient})
