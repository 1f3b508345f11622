r"""SparseGPT: prunes inputs one after another and lets later inputs compensate each error.

With H = XᵀX, damped, and R the upper Cholesky factor of H⁻¹ = RᵀR, inputs are visited in order.
Pruning input j of an output leaves the error e = (w_j − m_j·w_j)/R_jj. Later inputs compensate it
by w_k −= R_jk·e. Inputs come in blocks: an error updates the rest of its block at once, and all
later blocks in one product at the end of the block. A block's mask is selected when the block is
reached, over all outputs together, by w_j²/R²_jj: the loss of removing a weight alone. N:M patterns
select each group when it is reached. Weights of inputs already visited are final.

The factor 2/N of the published H cancels in R_jk/R_jj and in the order of scores, and is left out.
The diagonal of a dead input (H_jj = 0) becomes the mean diagonal instead of 1, so nothing depends
on the scale of the activations.

References:
    Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ICML 2023 (arXiv 2301.00774), Algorithm 1.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from jaxprune.errors import InputError
from jaxprune.methods import Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import Scalar, add_ridge, masked, matmul
from jaxprune.sparsity.patterns import Pattern
from jaxprune.sparsity.selection import Selector


class Prepared(NamedTuple):
    """Computed once for all kernels with the same inputs.

    Attributes:
        factor: R, upper triangular.
        alive: whether an input is ever non-zero.
    """

    factor: Float[Array, "n n"]
    alive: Bool[Array, "n"]


@dataclasses.dataclass(frozen=True)
class SparseGPT:
    """Prunes input by input and compensates each error with later inputs.

    Under a given mask it only updates weights.
    """

    block: int = 128
    """Number of inputs whose mask is selected at once; for N:M patterns, rounded down to a multiple
    of M."""
    damping: float = 0.01
    """Ridge, as a fraction of the mean diagonal of the Gram matrix."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(f"block must be at least 1, not {self.block}")
        if not 0 < self.damping < math.inf:
            raise InputError(f"damping must be finite and positive, not {self.damping}")

    @property
    def per_output(self) -> bool:
        return False

    def prepare(self, gram: Gram) -> Prepared:
        return _prepare(gram, self.damping)

    def solve(self, prepared: Prepared, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        n = len(weight)
        if not isinstance(pattern, Pattern):
            return _solve(prepared, weight, pattern, min(self.block, n), min(self.block, n))
        group = pattern.group or min(self.block, n)
        block = max(min(self.block, n) // group, 1) * group
        # Differences of rounded cumulative counts: the zeros of all groups add up exactly.
        ends = [min(start + group, n) for start in range(0, -(-n // block) * block, group)]
        selector = pattern.selector(weight.shape, [end / n for end in ends]).increments()
        return _solve(prepared, weight, selector, block, group)


@jax.jit
def _prepare(gram: Gram, damping: Scalar) -> Prepared:
    alive = jnp.diagonal(gram) > 0
    mean = jnp.mean(jnp.diagonal(gram))
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    damped = add_ridge(gram, damping) + jnp.diag(jnp.where(alive, jnp.zeros_like(mean), mean))
    # With rows and columns reversed, the Cholesky factorization gives H = UUᵀ with U upper
    # triangular; then R = U⁻¹.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return Prepared(solve_triangular(upper, jnp.eye(len(gram), dtype=gram.dtype)), alive)


@partial(jax.jit, static_argnames=("block", "group"))
def _solve(
    prepared: Prepared, weight: Kernel, select: Selector | Mask, block: int, group: int
) -> Solution:
    """Visits the inputs block by block, under a given mask or under one selected group by group."""
    n, m = weight.shape
    padding = -n % block
    weight = masked(jnp.broadcast_to(prepared.alive[:, None], weight.shape), weight)
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    # Padded inputs have R_jj = 1 and zeros elsewhere, so they neither receive nor cause errors.
    factor = jnp.pad(prepared.factor, (0, padding)) + jnp.diag(
        (jnp.arange(n + padding) >= n).astype(weight.dtype)
    )
    mask = (
        jnp.zeros(weight.shape, bool)
        if isinstance(select, Selector)
        else jnp.pad(select, ((0, padding), (0, 0)))
    )

    def visit_block(number: int | Array, state: tuple[Kernel, Mask]) -> tuple[Kernel, Mask]:
        weight, mask = state
        start = number * block
        rows = lax.dynamic_slice_in_dim(factor, start, block)
        square = lax.dynamic_slice_in_dim(rows, start, block, axis=1)

        def visit_group(
            index: int | Array, state: tuple[Kernel, Mask, Kernel]
        ) -> tuple[Kernel, Mask, Kernel]:
            values, mask, errors = state
            if isinstance(select, Selector):
                chosen = lax.dynamic_slice_in_dim(values, index * group, group)
                roots = lax.dynamic_slice_in_dim(jnp.diagonal(square), index * group, group)
                real = start + index * group + jnp.arange(group, dtype=jnp.int32) < n
                scores = jnp.where(
                    real[:, None], jnp.abs(chosen / roots[:, None]), jnp.full_like(chosen, jnp.inf)
                )
                mask = lax.dynamic_update_slice_in_dim(
                    mask, select(scores, start // group + index), index * group, axis=0
                )

            visit = partial(_visit_input, square, mask, index * group)
            values, errors = lax.fori_loop(0, group, visit, (values, errors))
            return values, mask, errors

        values = lax.dynamic_slice_in_dim(weight, start, block)
        block_mask = lax.dynamic_slice_in_dim(mask, start, block)
        values, block_mask, errors = lax.fori_loop(
            0, block // group, visit_group, (values, block_mask, jnp.zeros_like(values))
        )
        after = jnp.arange(n + padding, dtype=jnp.int32) >= start + block
        later = masked(jnp.broadcast_to(after[None, :], rows.shape), rows)
        weight = weight - matmul(later.T, errors)
        weight = lax.dynamic_update_slice_in_dim(weight, masked(block_mask, values), start, axis=0)
        return weight, lax.dynamic_update_slice_in_dim(mask, block_mask, start, axis=0)

    weight, mask = lax.fori_loop(0, (n + padding) // block, visit_block, (weight, mask))
    return Solution(weight[:n], mask[:n], {})


def _visit_input(
    factor: Float[Array, "b b"],
    mask: Mask,
    first: Array,
    offset: int | Array,
    state: tuple[Kernel, Kernel],
) -> tuple[Kernel, Kernel]:
    """Prunes an input and corrects the later inputs of its block.

    Args:
        factor: [b, b], the block's part of R.
        mask: [b, m], of the block.
        first: the index in the block of the first input of the group.
        offset: the index of the input in its group.
        state: the block's weights, and the errors of the inputs pruned so far.
    """
    values, errors = state
    j = first + offset
    row = lax.dynamic_index_in_dim(factor, j, keepdims=False)
    value = lax.dynamic_index_in_dim(values, j, keepdims=False)
    kept = lax.dynamic_index_in_dim(mask, j, keepdims=False)
    error = masked(~kept, value) / row[j]
    later = masked(jnp.arange(len(row), dtype=jnp.int32) > j, row)
    values = values - later[:, None] * error[None, :]
    return values, lax.dynamic_update_index_in_dim(errors, error, j, axis=0)
