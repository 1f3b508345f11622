"""Statistics of a linear layer: the Gram matrix and activation shift of its inputs, and its
relative error."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from jaxprune.methods.linalg import Scalar, exact_products, matmul, precondition, quadratic


def gram(
    x: Float[Array, "*tokens n"], weights: Float[Array, "*tokens"] | None = None
) -> Float[Array, "n n"]:
    """Returns XᵀX, or Xᵀ diag(w) X, in float32 (float64 for float64 inputs); see `add_gram`."""
    dtype = x.dtype if x.dtype == jnp.float64 else jnp.float32
    return symmetric(add_gram(jnp.zeros((x.shape[-1],) * 2, dtype), x, weights))


def add_gram(
    total: Float[Array, "n n"],
    x: Float[Array, "*tokens n"],
    weights: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "n n"]:
    """Adds XᵀX, or Xᵀ diag(w) X, to the blocks of a total up to its diagonal; `symmetric` mirrors
    them.

    Products of two 16-bit floats are exact in float32. So 16-bit inputs are multiplied without a
    cast, on the matrix units, and accumulated in float32. float32 inputs are multiplied with
    float32 accuracy.

    Args:
        total: [n, n], float32, or float64 for float64 inputs.
        x: [*tokens, n], activations of any floating dtype.
        weights: [*tokens], non-negative; with them the product is computed in the dtype of the
            total.

    Returns:
        The new total.
    """
    left = x = x.reshape(-1, x.shape[-1])
    if weights is not None:
        x = x.astype(total.dtype)
        left = x * weights.reshape(-1, 1).astype(total.dtype)
    blocks = _blocks(len(total))
    lefts, rights = [left[:, rows] for rows in blocks], [x[:, columns] for columns in blocks]
    for i, rows in enumerate(blocks):
        for j, columns in enumerate(blocks[: i + 1]):
            added = jax.lax.dot_general(
                lefts[i],
                rights[j],
                (((0,), (0,)), ((), ())),
                precision=exact_products(x.dtype) if x.dtype == total.dtype else None,
                preferred_element_type=total.dtype,
            )
            total = total.at[rows, columns].add(added)
    return total


def add_grouped(
    total: Float[Array, "g n n"],
    x: Float[Array, "blocks rows n"],
    weights: Float[Array, "blocks rows"],
    group: Int[Array, "blocks"],
) -> Float[Array, "g n n"]:
    """Adds each block's Xᵀ diag(w) X to the total of its group, in blocks up to the diagonal.

    The loop visits the blocks from the first to the last that has a group; the others cost nothing.

    Args:
        total: [g, n, n], float32, or float64 for float64 inputs.
        x: [blocks, rows, n], activations of any floating dtype.
        weights: [blocks, rows], non-negative.
        group: [blocks], the index of each block's total; negative: none.

    Returns:
        The new totals.
    """
    parts, count = _blocks(total.shape[1]), len(group)
    number = jnp.arange(count, dtype=jnp.int32)
    begin = jnp.min(jnp.where(group >= 0, number, jnp.int32(count)))
    end = jnp.max(jnp.where(group >= 0, number + 1, jnp.int32(0)))

    def add(block: Array, total: Array) -> Array:
        right = x[block].astype(total.dtype)
        left, at = right * weights[block][:, None].astype(total.dtype), group[block]
        for i, rows in enumerate(parts):
            for columns in parts[: i + 1]:
                added = matmul(left[:, rows].T, right[:, columns])
                place = at, jnp.int32(rows.start), jnp.int32(columns.start)
                added = added[None] + jax.lax.dynamic_slice(total, place, (1, *added.shape))
                total = jax.lax.dynamic_update_slice(total, added, place)
        return total

    return jax.lax.fori_loop(begin, end, add, total)


@partial(jax.jit, donate_argnums=0)
def symmetric(total: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the symmetric matrix of a total that was added up to its diagonal. The total is
    donated.

    Blocks on the diagonal are mirrored too, because not every matrix product rounds XᵀX
    symmetrically.
    """
    for rows in _blocks(len(total)):
        total = total.at[: rows.start, rows].set(total[rows, : rows.start].T)
        block = total[rows, rows]
        total = total.at[rows, rows].set(jnp.tril(block) + jnp.tril(block, -1).T)
    return total


def _blocks(n: int) -> list[slice]:
    """Returns the rows of a symmetric matrix in four blocks, or fewer if it is small. With four,
    the blocks up to the diagonal are 5/8 of the matrix."""
    count = min(4, max(1, n // 128))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def products(n: int) -> int:
    """Returns the number of multiplications per token of n features in `add_gram` and
    `add_grouped`."""
    return sum((rows.stop - rows.start) * rows.stop for rows in _blocks(n))


def add_shift(
    total: Float[Array, "n n"],
    x: Float[Array, "*tokens n"],
    dense: Float[Array, "*tokens n"],
    weights: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "n n"]:
    """Adds the activation shift X̂ᵀ(X − X̂), or X̂ᵀ diag(w) (X − X̂), to a total.

    Args:
        total: [n, n], float32, or float64 for float64 inputs.
        x: X̂, [*tokens, n], the inputs after pruned layers, of any floating dtype.
        dense: X, [*tokens, n], the inputs in the dense model.
        weights: [*tokens], non-negative.

    Returns:
        The new total.
    """
    x, dense = (a.reshape(-1, a.shape[-1]).astype(total.dtype) for a in (x, dense))
    away = dense - x
    if weights is not None:
        away = away * weights.reshape(-1, 1).astype(total.dtype)
    return total + matmul(x.T, away)


@jax.jit
def shifted_target(
    gram: Float[Array, "n n"],
    shift: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    share: Scalar,
) -> Float[Array, "n m"]:
    """Returns W + α(Ĝ + λI)⁻¹X̂ᵀ(X − X̂)W, a kernel that compensates a fraction α of the activation
    shift.

    It is the least-squares solution for the outputs X̂W + α(X − X̂)W. With α = 1 these are the
    dense model's outputs, with α = 0 the kernel's own. λ is a ridge towards W: 0.03 of the mean
    diagonal of Ĝ scaled to unit diagonal.

    Args:
        gram: Ĝ = X̂ᵀX̂, [n, n].
        shift: X̂ᵀ(X − X̂), [n, n].
        kernel: W, [n, m], in the Gram matrix's dtype.
        share: α.
    """
    scale, scaled = precondition(gram, 0.03)
    factor = jnp.linalg.cholesky(scaled)
    missing = matmul(shift, kernel) / scale[:, None]
    return (
        kernel
        + jnp.asarray(share, gram.dtype) * cho_solve((factor, True), missing) / scale[:, None]
    )


def relative_error(
    gram: Float[Array, "n n"], dense: Float[Array, "n m"], pruned: Float[Array, "n m"]
) -> Float[Array, ""]:
    """Returns ‖XW − XŴ‖²_F / ‖XW‖²_F from H = XᵀX; 0 if both outputs are zero."""
    dense, pruned = dense.astype(gram.dtype), pruned.astype(gram.dtype)
    loss, scale = quadratic(gram, dense - pruned), quadratic(gram, dense)
    # Rounding can leave a loss that is truly zero slightly negative.
    loss = jnp.maximum(loss, jnp.zeros_like(loss))
    return jnp.where(loss == 0, loss, loss / scale)
