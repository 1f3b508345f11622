"""Causal attention whose memory grows with the window, not with its square."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

QUERY_BLOCK = 256


def causal_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b t k d"], value: Float[Array, "b t k d"]
) -> Float[Array, "b t h d"]:
    """softmax(QKᵀ/√d)V over the positions up to each query's own; h query heads share k key heads in order.

    On a GPU, 16-bit inputs go to cuDNN's flash attention. Elsewhere queries are taken in blocks, so that the
    scores of one block, [b, h, 256, t], are the largest array.
    """
    t, d = query.shape[1], query.shape[3]
    if jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and d % 8 == 0 and d <= 128:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
    if t <= QUERY_BLOCK:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    positions = jnp.arange(t, dtype=jnp.int32)

    def attend(start: Array) -> Array:
        block = lax.dynamic_slice_in_dim(query, start, QUERY_BLOCK, axis=1)
        here = start + jnp.arange(QUERY_BLOCK, dtype=jnp.int32)
        mask = (positions[None, :] <= here[:, None])[None, None]
        return jax.nn.dot_product_attention(block, key, value, mask=mask)

    # The last block may overlap the one before it, so that every block has the same shape.
    starts = jnp.minimum(jnp.arange(0, t, QUERY_BLOCK, dtype=jnp.int32), jnp.int32(t - QUERY_BLOCK))
    blocks = lax.map(attend, starts)
    whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    rest = t - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1][:, QUERY_BLOCK - rest :]], axis=1)
