"""Causal attention whose memory grows with the window, not with its square."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 256


class Layout(NamedTuple):
    """How several texts lie in one window, and how some of them share their beginning.

    A group is a common beginning and its continuations, one behind the other. A token sees the tokens before it of
    its own continuation and of the beginning of its group, as if its text stood alone.

    Attributes:
        positions: of each token in its own text, from 0.
        group: number of its group in the window.
        branch: number of its continuation from 1; 0 is the common beginning.
    """

    positions: Int[Array | np.ndarray, "b t"]
    group: Int[Array | np.ndarray, "b t"]
    branch: Int[Array | np.ndarray, "b t"]


def causal_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t k d"],
    value: Float[Array, "b t k d"],
    layout: Layout | None = None,
) -> Float[Array, "b t h d"]:
    """softmax(QKᵀ/√d)V over the tokens that each query sees; h query heads share k key heads in order.

    Without a layout a token sees all tokens up to itself. On a GPU, 16-bit inputs then go to cuDNN's flash attention.
    Elsewhere queries are taken in blocks, so that the scores of one block, [b, h, 256, t], are the largest array.
    """
    t, d = query.shape[1], query.shape[3]
    if layout is None:
        if jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and d % 8 == 0 and d <= 128:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
        if t <= QUERY_BLOCK:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def attend(start: Array) -> Array:
        block = lax.dynamic_slice_in_dim(query, start, min(t, QUERY_BLOCK), axis=1)
        mask = _visible(start, min(t, QUERY_BLOCK), t, layout)
        return jax.nn.dot_product_attention(block, key, value, mask=mask)

    if t <= QUERY_BLOCK:
        return attend(jnp.int32(0))

    # The last block may overlap the one before it, so that every block has the same shape.
    starts = jnp.minimum(jnp.arange(0, t, QUERY_BLOCK, dtype=jnp.int32), jnp.int32(t - QUERY_BLOCK))
    blocks = lax.map(attend, starts)
    whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    rest = t - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1][:, QUERY_BLOCK - rest :]], axis=1)


def _visible(start: Array, count: int, t: int, layout: Layout | None) -> Bool[Array, "_ 1 count t"]:
    """Which of all t tokens the `count` queries from `start` on see."""
    here, there = start + jnp.arange(count, dtype=jnp.int32), jnp.arange(t, dtype=jnp.int32)
    visible = (there[None, :] <= here[:, None])[None, None]
    if layout is None:
        return visible

    def of_queries(x: Array | np.ndarray) -> Array:
        return lax.dynamic_slice_in_dim(jnp.asarray(x), start, count, axis=1)[:, None, :, None]

    group, branch = layout.group[:, None, None, :], layout.branch[:, None, None, :]
    shared = jnp.zeros_like(branch)
    return visible & (group == of_queries(layout.group)) & ((branch == shared) | (branch == of_queries(layout.branch)))
