"""Causal attention whose memory grows with the window, not with its square."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

SEGMENTS = 16
"""A window has so many segments at most; a segment's queries are multiplied with the keys up to its end only."""
SMALLEST, LARGEST = 64, 256
"""Queries at a time: segments are no shorter than the one, and are visited in blocks no longer than the other."""


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
    """softmax(QKᵀ/√d)V over the tokens that each query sees; h query heads share h/k key heads in order.

    Without a layout a token sees all tokens up to itself. On a GPU, 16-bit inputs then go to cuDNN's flash attention.
    Elsewhere queries are taken in blocks, so that the scores of one block, [b, h, 256, t], are the largest array, and
    most of the masked half of the scores is never computed.
    """
    t, d = query.shape[1], query.shape[3]
    if layout is None and jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and d % 8 == 0 and d <= 128:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
    segment = max(SMALLEST, -(-t // SEGMENTS))
    bounds = [(start, min(start + segment, t)) for start in range(0, t, segment)]
    parts = [_attend_segment(query, key[:, :end], value[:, :end], start, layout) for start, end in bounds]
    return jnp.concatenate(parts, axis=1)


def _attend_segment(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    start: int,
    layout: Layout | None,
) -> Float[Array, "b _ h d"]:
    """The attention of the queries from `start` to s over the first s tokens."""
    end = key.shape[1]
    if end - start <= LARGEST:
        return _attend(query[:, start:end], key, value, _visible(jnp.int32(start), end - start, end, layout))

    def attend(begin: Array) -> Array:
        block = lax.dynamic_slice_in_dim(query, begin, LARGEST, axis=1)
        return _attend(block, key, value, _visible(begin, LARGEST, end, layout))

    # The last block may overlap the one before it, so that every block has the same shape.
    starts = jnp.minimum(jnp.arange(start, end, LARGEST, dtype=jnp.int32), jnp.int32(end - LARGEST))
    blocks = lax.map(attend, starts)
    whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    rest = end - start - whole.shape[1]
    return jnp.concatenate([whole, blocks[-1][:, LARGEST - rest :]], axis=1)


def _attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    visible: Bool[Array, "_ 1 q s"],
) -> Float[Array, "b q h d"]:
    """Queries of heads that share a key head are rows of one product; the softmax is float32 (or float64)."""
    b, q, h, d = query.shape
    k = key.shape[2]
    float32 = jnp.promote_types(query.dtype, jnp.float32)
    rows = query.reshape(b, q, k, h // k, d).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, d)
    keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    scores = jnp.matmul(rows, keys, preferred_element_type=float32) * jnp.asarray(d**-0.5, float32)
    scores = jnp.where(visible[:, :, None], scores.reshape(b, k, h // k, q, -1), jnp.finfo(float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype).reshape(b, k, -1, scores.shape[-1])
    mixed = jnp.matmul(weights, values, preferred_element_type=float32).reshape(b, k, h // k, q, d) / total
    return mixed.astype(value.dtype).transpose(0, 3, 1, 2, 4).reshape(b, q, h, d)


def _visible(start: Array, count: int, t: int, layout: Layout | None) -> Bool[Array, "_ 1 count t"]:
    """Which of the first t tokens the `count` queries from `start` on see."""
    here, there = start + jnp.arange(count, dtype=jnp.int32), jnp.arange(t, dtype=jnp.int32)
    visible = (there[None, :] <= here[:, None])[None, None]
    if layout is None:
        return visible
    layout = Layout(*(jnp.asarray(field)[:, :t] for field in layout))

    def of_queries(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, count, axis=1)[:, None, :, None]

    group, branch = layout.group[:, None, None, :], layout.branch[:, None, None, :]
    shared = jnp.zeros_like(branch)
    return visible & (group == of_queries(layout.group)) & ((branch == shared) | (branch == of_queries(layout.branch)))
