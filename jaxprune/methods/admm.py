r"""ADMM: masked least squares by the alternating direction method of multipliers.

Minimises ‖XW₀ − XW‖²_F over W that are zero outside a mask. With H = XᵀX and D = diag(√H_jj) the
problem is first scaled to unit diagonal, G = D⁻¹HD⁻¹ and W ← DW, and damped, G ← G + λ·mean(diag
G)·I. B = G·W₀ is taken after damping, so λ acts as a ridge towards the dense weights. From W = W₀,
U = 0 each iteration is

    M = mask of the largest |W + U|            (the first iterations only)
    Z = M ∘ (W + U)
    U = U + W − Z
    W = (G + ρI)⁻¹ (B + ρ(Z − U))

and the result is D⁻¹(M ∘ (W + U)). G + ρI does not change, so it is factorized once for all kernels
that share their inputs, and an iteration costs one product of n·n by n·m.

The code stores V = W + U instead of U. Then U is zero where M keeps and V elsewhere, Z − U is ±V
(plus where M keeps), and the result is D⁻¹(M ∘ W). The code also stores W − W₀ instead of W. Since
B + ρ(Z − U) is (G + ρI)W₀ + ρ(Z − U − W₀), an iteration is

    W − W₀ = (G + ρI)⁻¹ ρ(Z − U − W₀)

This needs neither B nor G, and avoids the rounding of terms that the large eigenvalues of G first
amplify and then shrink.

References:
    Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024 (arXiv
    2401.02938), Algorithm 1.
"""

import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from jaxprune.errors import InputError
from jaxprune.methods import SELECTS, Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import Scalar, inverse, masked, matmul, precondition
from jaxprune.sparsity.patterns import Pattern, cubic
from jaxprune.sparsity.selection import Selector

LinearSolve = Literal["inverse", "cholesky"]


class Prepared(NamedTuple):
    """Computed once for all kernels with the same inputs.

    Attributes:
        scale: d_j = √H_jj + 1e-8, the diagonal of D.
        operator: (G + ρI)⁻¹, or the lower Cholesky factor of G + ρI.
    """

    scale: Float[Array, "n"]
    operator: Float[Array, "n n"]


@dataclasses.dataclass(frozen=True)
class ADMM:
    """Selects the mask gradually while it re-optimizes the kept weights.

    Under a given mask it only re-optimizes.
    """

    schedule: Literal["cubic", "constant"] = dataclasses.field(default="cubic", metadata=SELECTS)
    """How the sparsity grows while the mask is selected: cubic, as in the paper, or constant (the
    final sparsity at every selection), as in its published code for unstructured patterns."""
    iterations: int = 20
    """Number of ADMM iterations (k in the paper)."""
    selections: int = dataclasses.field(default=15, metadata=SELECTS)
    """Number of iterations, from the first, that select a new mask (k_s in the paper). Later
    iterations keep the last mask. 0 selects the mask once, from the dense weights."""
    damping: float = 0.1
    """Ridge towards the dense weights (lambda), as a fraction of the mean diagonal of the scaled
    Gram matrix."""
    rho: float = 1.0
    """ADMM penalty factor."""
    linear_solve: LinearSolve = "inverse"
    """How an iteration applies (G + rho I)^-1: an explicit inverse, or two triangular solves with
    its Cholesky factor."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1, not {self.iterations}")
        if self.selections < 0:
            raise InputError(f"selections must not be negative, not {self.selections}")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"damping must be finite and not negative, not {self.damping}")
        if not 0 < self.rho < math.inf:
            raise InputError(f"rho must be finite and positive, not {self.rho}")
        for value, choices in (
            (self.schedule, ("cubic", "constant")),
            (self.linear_solve, get_args(LinearSolve)),
        ):
            if value not in choices:
                raise InputError(f"{value!r} is not one of {', '.join(choices)}")

    @property
    def per_output(self) -> bool:
        return False

    def progress(self) -> list[float]:
        """Returns the fractions of the final sparsity at the selections: 1 − (1 − (i+1)/k_s)³, or 1
        throughout."""
        steps = max(min(self.selections, self.iterations), 1)
        return [1.0] * steps if self.schedule == "constant" else cubic(steps)

    def prepare(self, gram: Gram) -> Prepared:
        return _prepare(gram, self.damping, self.rho, self.linear_solve)

    def solve(self, prepared: Prepared, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        if not isinstance(pattern, Pattern):
            return _solve(
                prepared, weight, pattern, self.rho, self.iterations, 0, self.linear_solve
            )
        selector = pattern.selector(weight.shape, self.progress())
        selections = min(self.selections, self.iterations)
        return _solve(
            prepared, weight, selector, self.rho, self.iterations, selections, self.linear_solve
        )


@partial(jax.jit, static_argnames="linear_solve")
def _prepare(gram: Gram, damping: Scalar, rho: Scalar, linear_solve: LinearSolve) -> Prepared:
    scale, gram = precondition(gram, damping)
    gram = gram + jnp.asarray(rho, gram.dtype) * jnp.eye(len(gram), dtype=gram.dtype)
    return Prepared(
        scale, inverse(gram) if linear_solve == "inverse" else jnp.linalg.cholesky(gram)
    )


@partial(jax.jit, static_argnames=("iterations", "selections", "linear_solve"))
def _solve(
    prepared: Prepared,
    weight: Kernel,
    select: Selector | Mask,
    rho: Scalar,
    iterations: int,
    selections: int,
    linear_solve: LinearSolve,
) -> Solution:
    """Iterates under a given mask, or under a mask that a selector renews in the first `selections`
    iterations."""
    scale = prepared.scale[:, None]
    rho = jnp.asarray(rho, weight.dtype)
    dense = scale * weight

    def apply_inverse(rhs: Kernel) -> Kernel:
        if linear_solve == "inverse":
            return matmul(prepared.operator, rhs)
        return cho_solve((prepared.operator, True), rhs)

    def sum_of(moved: Kernel, v: Kernel, mask: Mask) -> Kernel:
        """Returns W + U, from W − W₀ and the previous V and M."""
        return dense + moved + masked(~mask, v)

    def iterate(v: Kernel, mask: Mask) -> tuple[Kernel, Kernel, Mask]:
        return apply_inverse(rho * (jnp.where(mask, v, -v) - dense)), v, mask

    state = jnp.zeros_like(dense), dense, jnp.ones(dense.shape, bool)
    if isinstance(select, Selector) and selections:

        def select_and_iterate(
            i: int | Array, state: tuple[Kernel, Kernel, Mask]
        ) -> tuple[Kernel, Kernel, Mask]:
            v = sum_of(*state)
            return iterate(v, select(jnp.abs(v), i))

        state = lax.fori_loop(0, selections, select_and_iterate, state)
    else:
        mask = select(jnp.abs(dense)) if isinstance(select, Selector) else select
        state = iterate(dense, mask)
        selections = 1

    def iterate_again(
        _: int | Array, state: tuple[Kernel, Kernel, Mask]
    ) -> tuple[Kernel, Kernel, Mask]:
        return iterate(sum_of(*state), state[2])

    moved, _, mask = lax.fori_loop(selections, iterations, iterate_again, state)
    w = dense + moved
    lost = jnp.linalg.norm(masked(~mask, w)) / jnp.maximum(
        jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny
    )
    return Solution(masked(mask, w) / scale, mask, {"primal_residual": lost})
