r"""ALPS: ADMM with a growing penalty until the support settles, then conjugate gradients.

The problem is scaled to unit diagonal: G = D⁻¹(H + ridge)D⁻¹, W₀ ← DW₀ and B = GW₀. P keeps the
largest entries by magnitude. From D = P(W₀), V = 0 and ρ = 0.1 each iteration is

    W = (G + ρI)⁻¹ (B − V + ρD)
    D = P(W + V/ρ)
    V = V + ρ(W − D)

Every third iteration increases ρ, by a larger factor if more of the support has changed. The
iterations end when the support no longer changes. The support of P(W) is the mask, and at most ten
steps of conjugate gradients on it finish the weights.

G = QΛQᵀ is computed once for all kernels that share their inputs, so (G + ρI)⁻¹ = Q(Λ + ρ)⁻¹Qᵀ for
any ρ. The inverse is formed once per ρ, for three products by n·m. This takes 2n³ + 6n²m FLOPs,
instead of 12n²m for multiplying by Q and Qᵀ in turn.

References:
    Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models", NeurIPS 2024 (arXiv 2406.07831), algorithm 1, and its published code for the constants
    of the ρ update.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import InputError
from jaxprune.methods import SELECTS, UPDATES, Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import (
    Scalar,
    add_ridge,
    conjugate_gradients,
    masked,
    matmul,
    precondition,
)
from jaxprune.sparsity.patterns import Pattern
from jaxprune.sparsity.selection import Selector

CHECK = 3
"""Iterations between two checks of the support."""
SETTLES = 30
"""Iterations after which the search ends if the support hardly changes."""


class Prepared(NamedTuple):
    """Computed once for all kernels with the same inputs.

    Attributes:
        scale: √diag of the damped Gram matrix + 1e-8, the diagonal of D.
        gram: G.
        values: Λ, ascending.
        vectors: Q.
    """

    scale: Float[Array, "n"]
    gram: Gram
    values: Float[Array, "n"]
    vectors: Float[Array, "n n"]


class State(NamedTuple):
    """The state of the search for a support, between two checks.

    Attributes:
        weight, kept, dual: W, D, V.
        support: the support of D at the last check.
        rho: the penalty.
        settling: whether the support has ever changed by more than 0.5 %; if so, ρ grows.
        checks: the number of checks so far.
        done: whether the support has settled.
    """

    weight: Kernel
    kept: Kernel
    dual: Kernel
    support: Mask
    rho: Float[Array, ""]
    settling: Bool[Array, ""]
    checks: Int[Array, ""]
    done: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class ALPS:
    """Selects the mask by ADMM with a growing penalty, then solves under it.

    Under a given mask it only solves.
    """

    iterations: int = dataclasses.field(default=300, metadata=SELECTS)
    """Maximum number of ADMM iterations; they stop when the mask settles."""
    rho: float = dataclasses.field(default=0.1, metadata=SELECTS)
    """Initial ADMM penalty factor."""
    cg_steps: int = dataclasses.field(default=10, metadata=UPDATES)
    """Maximum number of conjugate-gradient steps under the final mask."""
    cg_tolerance: float = dataclasses.field(default=1e-4, metadata=UPDATES)
    """Relative tolerance: conjugate gradients stop when the gradient of each output has shrunk to
    this fraction of its value at zero weights."""
    damping: float = 0.01
    """Ridge, as a fraction of the mean diagonal of the unscaled Gram matrix."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.cg_steps < 0:
            raise InputError(
                f"iterations must be at least 1 and cg_steps not negative, not {self.iterations} "
                f"and {self.cg_steps}"
            )
        if not (0 < self.rho < math.inf and 0 < self.damping < math.inf):
            raise InputError(
                f"rho and damping must be finite and positive, not {self.rho} and {self.damping}"
            )
        if not 0 <= self.cg_tolerance < math.inf:
            raise InputError(
                f"cg_tolerance must be finite and not negative, not {self.cg_tolerance}"
            )

    @property
    def per_output(self) -> bool:
        return False

    def prepare(self, gram: Gram) -> Prepared:
        return _prepare(gram, self.damping)

    def solve(self, prepared: Prepared, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        if not isinstance(pattern, Pattern):
            start = masked(pattern, weight)
            return _finish(prepared, weight, start, pattern, self.cg_steps, self.cg_tolerance, {})
        selector = pattern.selector(weight.shape)
        found, mask, metrics = _search(prepared, weight, selector, self.iterations, self.rho)
        return _finish(prepared, weight, found, mask, self.cg_steps, self.cg_tolerance, metrics)


@jax.jit
def _prepare(gram: Gram, damping: Scalar) -> Prepared:
    scale, gram = precondition(add_ridge(gram, damping), 0.0)
    values, vectors = jnp.linalg.eigh(gram)
    # Rounding can leave a tiny eigenvalue negative.
    return Prepared(
        scale, gram, jnp.maximum(values, jnp.finfo(gram.dtype).eps * values[-1]), vectors
    )


@jax.jit
def _search(
    prepared: Prepared,
    weight: Kernel,
    select: Selector,
    iterations: int | Int[Array, ""],
    rho: Scalar,
) -> tuple[Kernel, Mask, dict[str, Array]]:
    """Returns the weights and the support that ADMM settles on, and metrics."""
    scale = prepared.scale[:, None]
    dense = scale * weight
    target = matmul(prepared.gram, dense)
    first = select(jnp.abs(dense))
    count = jnp.sum(first, dtype=jnp.int32)

    def check(state: State) -> State:
        rho = state.rho
        inverse = matmul(prepared.vectors / (prepared.values + rho)[None, :], prepared.vectors.T)

        def iterate(
            _: int | Array, current: tuple[Kernel, Kernel, Kernel, Mask]
        ) -> tuple[Kernel, Kernel, Kernel, Mask]:
            _, kept, dual, _ = current
            w = matmul(inverse, target - dual + rho * kept)
            candidate = w + dual / rho
            support = select(jnp.abs(candidate))
            kept = masked(support, candidate)
            return w, kept, dual + rho * (w - kept), support

        done_before = state.checks * CHECK
        turns = jnp.minimum(done_before + CHECK, iterations) - done_before
        current = state.weight, state.kept, state.dual, state.support
        w, kept, dual, support = lax.fori_loop(0, turns, iterate, current)

        changes = jnp.sum(support != state.support, dtype=jnp.int32)
        penalty = _next_penalty(state, changes, count, done_before + turns)
        return State(
            weight=jnp.where(penalty.restart, dense, w),
            kept=jnp.where(penalty.restart, masked(first, dense), kept),
            dual=masked(jnp.broadcast_to(~penalty.restart, dual.shape), dual),
            support=support,
            rho=penalty.rho,
            settling=penalty.settling,
            checks=state.checks + jnp.ones_like(state.checks),
            done=penalty.done,
        )

    start = State(
        weight=dense,
        kept=masked(first, dense),
        dual=jnp.zeros_like(dense),
        support=first,
        rho=jnp.asarray(rho, dense.dtype),
        settling=jnp.zeros((), bool),
        checks=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    end = lax.while_loop(
        lambda state: ~state.done & (state.checks * CHECK < iterations), check, start
    )
    mask = select(jnp.abs(end.weight))
    metrics = {"rho": end.rho, "checks": end.checks.astype(dense.dtype)}
    return masked(mask, end.weight) / scale, mask, metrics


class _Penalty(NamedTuple):
    """The penalty after a check; `State` describes the other fields.

    Attributes:
        restart: whether the search starts over.
    """

    rho: Float[Array, ""]
    settling: Bool[Array, ""]
    restart: Bool[Array, ""]
    done: Bool[Array, ""]


def _next_penalty(
    state: State, changes: Int[Array, ""], count: Int[Array, ""], iterations: Int[Array, ""]
) -> _Penalty:
    """Returns the penalty after a check; it grows more if more of the support has changed.

    Args:
        state: the state before the iterations that the check follows.
        changes: number of support entries that have changed since the previous check.
        count: number of entries in the support.
        iterations: number of iterations so far.
    """
    rho = state.rho
    changed = changes.astype(rho.dtype) / jnp.maximum(count, jnp.ones_like(count)).astype(rho.dtype)
    settling = state.settling | (changed > 0.005)
    some = changes > 0
    growth = jnp.where(
        changed > 0.1, 1.3, jnp.where(changed > 0.005, 1.2, jnp.where(some, 1.1, 1.0))
    )
    factor = jnp.where(settling, growth, 0.2).astype(rho.dtype)
    settled = (iterations >= SETTLES) & (changed < 0.0003)
    return _Penalty(
        rho=jnp.clip(rho * factor, jnp.asarray(1e-8, rho.dtype), jnp.asarray(1e6, rho.dtype)),
        settling=settling,
        # Too large an initial penalty freezes the first support: start over with a smaller one.
        restart=~settling & some,
        done=(settling & ~some) | settled,
    )


@jax.jit
def _finish(
    prepared: Prepared,
    weight: Kernel,
    start: Kernel,
    mask: Mask,
    steps: int | Int[Array, ""],
    tolerance: Scalar,
    metrics: dict[str, Array],
) -> Solution:
    scale = prepared.scale[:, None]
    minimum = conjugate_gradients(
        prepared.gram, scale * weight, scale * start, mask, steps, tolerance
    )
    return Solution(minimum.weight / scale, mask, metrics | {"cg_residual": minimum.residual})
