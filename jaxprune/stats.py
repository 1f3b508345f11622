"""What the pruner measures of a linear: the Gram matrix of its inputs, how far they drifted, its relative error."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from jaxprune.linalg import Scalar, matmul, precondition, quadratic


def gram(x: Float[Array, "*tokens n"], weights: Float[Array, "*tokens"] | None = None) -> Float[Array, "n n"]:
    """XᵀX, or Xᵀ diag(w) X, in float32 (float64 for float64 inputs).

    Products of two 16-bit floats are exact in float32, so 16-bit inputs are multiplied as they are, on the
    matrix units, and only the accumulation is float32. float32 inputs are multiplied at highest precision.

    Args:
        x: activations, any floating dtype; all leading axes are tokens.
        weights: one non-negative weight a token; the product then runs in float32.
    """
    x = x.reshape(-1, x.shape[-1])
    accumulate = x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)
    left = x
    if weights is not None:
        x = x.astype(accumulate)
        left = x * weights.reshape(-1, 1).astype(accumulate)
    return jax.lax.dot_general(
        left,
        x,
        (((0,), (0,)), ((), ())),
        precision="highest" if x.dtype == accumulate else None,
        preferred_element_type=accumulate,
    )


def drift(
    x: Float[Array, "*tokens n"], dense: Float[Array, "*tokens n"], weights: Float[Array, "*tokens"] | None = None
) -> Float[Array, "n n"]:
    """X̂ᵀ(X − X̂), or X̂ᵀ diag(w) (X − X̂), in float32: how far the inputs X̂ behind pruned layers are from the dense X.

    Args:
        x: X̂, any floating dtype; all leading axes are tokens.
        dense: X.
        weights: one non-negative weight a token.
    """
    accumulate = x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)
    x, dense = (a.reshape(-1, a.shape[-1]).astype(accumulate) for a in (x, dense))
    away = dense - x
    if weights is not None:
        away = away * weights.reshape(-1, 1).astype(accumulate)
    return matmul(x.T, away)


@jax.jit
def drifted_target(
    gram: Float[Array, "n n"], drift: Float[Array, "n n"], kernel: Float[Array, "n m"], share: Scalar
) -> Float[Array, "n m"]:
    """W + α(Ĝ + λI)⁻¹X̂ᵀ(X − X̂)W: the kernel whose outputs on X̂ make up for a share of what the inputs lost.

    Least squares for the outputs X̂W + α(X − X̂)W, of which α = 1 is the dense model's and α = 0 the kernel's own. λ is
    0.03 in units of the mean diagonal of Ĝ scaled to unit diagonal, towards W.

    Args:
        gram: Ĝ = X̂ᵀX̂.
        drift: X̂ᵀ(X − X̂).
        kernel: W, in the Gram matrix's dtype.
        share: α.
    """
    scale, scaled = precondition(gram, 0.03)
    factor = jnp.linalg.cholesky(scaled)
    missing = matmul(drift, kernel) / scale[:, None]
    return kernel + jnp.asarray(share, gram.dtype) * cho_solve((factor, True), missing) / scale[:, None]


def relative_error(
    gram: Float[Array, "n n"], dense: Float[Array, "n m"], pruned: Float[Array, "n m"]
) -> Float[Array, ""]:
    """‖XW − XŴ‖²_F / ‖XW‖²_F from H = XᵀX; 0 where the dense output is zero and so is the pruned one."""
    dense, pruned = dense.astype(gram.dtype), pruned.astype(gram.dtype)
    loss, scale = quadratic(gram, dense - pruned), quadratic(gram, dense)
    # Rounding can leave a loss that is truly zero slightly negative.
    loss = jnp.maximum(loss, jnp.zeros_like(loss))
    return jnp.where(loss == 0, loss, loss / scale)
