"""Causal attention whose memory grows with the window, not with its square."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import hardware
from jaxprune.models.common.cache import Cache
from jaxprune.models.common.matmul import product
from jaxprune.models.common.packed_windows import Layout

SEGMENTS_ON_CPU, SEGMENTS = 16, 4
"""A window has so many segments at most; a segment's queries are multiplied with the keys up to its
end only. With 16 the products of scores are 0.53 of all pairs, with 4 0.63, at a quarter of the
program."""
SMALLEST, LARGEST = 64, 256
"""Queries at a time: segments are no shorter than the one, and are visited in blocks no longer than
the other."""


def causal_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t k d"],
    value: Float[Array, "b t k d"],
    layout: Layout | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "h"] | None = None,
) -> Float[Array, "b t h d"]:
    """Returns softmax(s·QKᵀ)V over the tokens that each query sees; h query heads share h/k key
    heads in order.

    Without a layout a token sees all tokens up to itself, and goes to cuDNN's flash attention where
    that is. Elsewhere queries are taken in blocks, so that the scores of one block, [b, h, 256, t],
    are the largest array, and most of the masked scores are never computed.

    Args:
        query: h heads.
        key, value: k heads.
        layout: where a window holds several texts; or a cache, where texts are continued.
        window: how many tokens of its text a query sees at most, its own included; None: all before
            it.
        scale: s; None: 1/√d.
        softcap: c of c·tanh(score/c); None: scores are taken as they are.
        sinks: of each head, the score of a token without a value; None: there is none.
    """
    t, d = query.shape[1], query.shape[3]
    how = _How(
        d**-0.5 if scale is None else scale,
        softcap,
        None if window is None or window >= t else window,
    )
    if isinstance(layout, Cache):
        if layout.before is not None:
            return _attend_cached(query, key, value, layout, how._replace(window=window), sinks)
        layout.keep(tuple(_padded(_by_head(x), layout.capacity) for x in (key, value)))
        layout = None  # what lies after a text's end is seen by nothing of it
    if layout is None and softcap is None and sinks is None and cudnn_takes(query):
        local = None if window is None or window >= t else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scale,
            local_window_size=local,
            implementation="cudnn",
        )
    heads = _by_key_head(query, _by_head(key), _by_head(value), sinks)
    # else XLA would rotate and transpose the keys again for each segment
    heads = lax.optimization_barrier(heads)
    segment = max(SMALLEST, -(-t // (SEGMENTS_ON_CPU if hardware.current().on_cpu else SEGMENTS)))
    starts = range(0, t, segment)
    ends = tuple(min(start + segment, t) for start in starts)
    queries = lax.split(
        heads.query, [end - start for start, end in zip(starts, ends, strict=True)], axis=3
    )
    segments = zip(starts, queries, _up_to(heads.key, ends), _up_to(heads.value, ends), strict=True)
    parts = [
        _attend_segment(_Heads(q, k, v, heads.sinks), start, layout, how)
        for start, q, k, v in segments
    ]
    return _side_by_side(jnp.concatenate(parts, axis=3))


def cudnn_takes(query: Float[Array, "b t h d"]) -> bool:
    """Returns whether cuDNN's flash attention, where it is, takes such queries: 16-bit, heads of up
    to 128.

    An even number of them, for its gradient: windows of odd length are rare, and not worth two ways
    through a layer.
    """
    t, d = query.shape[1], query.shape[3]
    return (
        query.dtype.itemsize == 2
        and t % 2 == 0
        and d % 8 == 0
        and d <= 128
        and hardware.current().cudnn_attention
    )


class _Heads(NamedTuple):
    """Queries, keys and values by key head; g query heads share one. Sinks: see
    `causal_attention`."""

    query: Float[Array, "b k g t d"]
    key: Float[Array, "b k t d"]
    value: Float[Array, "b k t d"]
    sinks: Float[Array, "k g"] | None


class _How(NamedTuple):
    """Options of `causal_attention`; no window is one that all tokens fit."""

    scale: float
    softcap: float | None
    window: int | None


def _by_head(x: Float[Array, "b s k d"]) -> Float[Array, "b k s d"]:
    return x.transpose(0, 2, 1, 3)


def _by_key_head(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b k s d"],
    value: Float[Array, "b k s d"],
    sinks: Float[Array, "h"] | None,
) -> _Heads:
    """Returns heads with those that share a key head together."""
    (b, t, h, d), k = query.shape, key.shape[1]
    rows = query.reshape(b, t, k, h // k, d).transpose(0, 2, 3, 1, 4)
    sunk = None if sinks is None else sinks.reshape(k, -1)
    return _Heads(rows, key, value, sunk)


def _side_by_side(attended: Float[Array, "b k g t d"]) -> Float[Array, "b t h d"]:
    b, k, g, t, d = attended.shape
    return attended.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, d)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _up_to(x: Float[Array, "b k t d"], ends: tuple[int, ...]) -> list[Float[Array, "b k _ d"]]:
    """Returns what comes before each end. Its gradient is summed in float32, and in place: JAX's
    own pads each part."""
    return [x[:, :, :end] for end in ends]


def _sum_up_to(
    ends: tuple[int, ...], _: None, gradients: Sequence[Float[Array, "b k _ d"]]
) -> tuple[Float[Array, "b k t d"]]:
    *shorter, whole = gradients
    total = whole.astype(np.promote_types(whole.dtype, np.float32))
    for end, gradient in zip(ends[:-1], shorter, strict=True):
        total = total.at[:, :, :end].add(gradient.astype(total.dtype))
    return (total.astype(whole.dtype),)


_up_to.defvjp(lambda x, ends: (_up_to(x, ends), None), _sum_up_to)


def _padded(x: Float[Array, "b k t d"], length: int) -> Float[Array, "b k s d"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _attend_cached(
    query: Float[Array, "b 1 h d"],
    key: Float[Array, "b 1 k d"],
    value: Float[Array, "b 1 k d"],
    cache: Cache,
    how: _How,
    sinks: Float[Array, "h"] | None,
) -> Float[Array, "b 1 h d"]:
    """Returns the attention of one more token of each text over those before it, and keeps its key
    and value."""
    at = jnp.arange(len(query), dtype=jnp.int32), slice(None), cache.positions[:, 0]
    keys, values = (
        old.at[at].set(new[:, 0]) for old, new in zip(cache.take(), (key, value), strict=True)
    )
    cache.keep((keys, values))
    there, here = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, :], cache.positions
    visible = there <= here
    if how.window is not None:
        visible &= there > here - jnp.int32(how.window)
    return _side_by_side(
        _attend(_by_key_head(query, keys, values, sinks), visible[:, None, None], how)
    )


def _attend_segment(
    heads: _Heads, start: int, layout: Layout | None, how: _How
) -> Float[Array, "b k g _ d"]:
    """Returns the attention of queries, the first of which is token `start`, over what is there up
    to their end."""
    # A packed text's tokens may lie anywhere before; without a layout none lies further back than
    # the window.
    first = 0 if how.window is None or layout is not None else max(0, start - how.window + 1)
    seen = heads._replace(key=heads.key[:, :, first:], value=heads.value[:, :, first:])
    count, keys = heads.query.shape[3], (first, heads.key.shape[2])
    if count <= LARGEST:
        return _attend(seen, _visible(jnp.int32(start), count, keys, layout, how.window), how)

    def attend(begin: Array) -> Array:
        block = seen._replace(query=lax.dynamic_slice_in_dim(seen.query, begin, LARGEST, axis=3))
        return _attend(
            block, _visible(jnp.int32(start) + begin, LARGEST, keys, layout, how.window), how
        )

    # The last block may overlap the one before it, so that every block has the same shape.
    starts = jnp.minimum(jnp.arange(0, count, LARGEST, dtype=jnp.int32), jnp.int32(count - LARGEST))
    blocks = lax.map(attend, starts)
    rest = count - LARGEST * (len(blocks) - 1)
    return jnp.concatenate([*blocks[:-1], blocks[-1][:, :, :, LARGEST - rest :]], axis=3)


def _attend(heads: _Heads, visible: Bool[Array, "_ 1 q s"], how: _How) -> Float[Array, "b k g q d"]:
    """Returns the attention's output. Queries of heads that share a key head are rows of one
    product; the softmax is float32 (or float64)."""
    query, key, value, sinks = heads
    b, k, g, q, d = query.shape
    float32 = np.promote_types(query.dtype, np.float32)
    scores = product("bkqd,bksd->bkqs", query.reshape(b, k, g * q, d), key, float32)
    scores = scores.reshape(b, k, g, q, -1) * jnp.asarray(how.scale, float32)
    if how.softcap is not None:
        cap = jnp.asarray(how.softcap, float32)
        scores = jnp.tanh(scores / cap) * cap
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(float32).min)
    # it cancels, and so does its gradient
    most = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    if sinks is not None:
        sinks = sinks.astype(float32)[None, :, :, None, None]
        most = jnp.maximum(most, lax.stop_gradient(sinks))
    weights = jnp.exp(scores - most)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - most)
    rows = weights.astype(value.dtype).reshape(b, k, g * q, -1)
    mixed = product("bkqs,bksd->bkqd", rows, value, float32).reshape(b, k, g, q, d)
    return (mixed / total).astype(value.dtype)


def _visible(
    start: Array, count: int, keys: tuple[int, int], layout: Layout | None, window: int | None
) -> Bool[Array, "_ 1 count s"]:
    """Returns which of the tokens in a range the `count` queries from `start` on see."""
    here, there = start + jnp.arange(count, dtype=jnp.int32), jnp.arange(*keys, dtype=jnp.int32)
    visible = there[None, :] <= here[:, None]
    if layout is None and window is not None:
        visible &= there[None, :] > here[:, None] - jnp.int32(window)
    visible = visible[None, None]
    if layout is None:
        return visible
    layout = jax.tree.map(lambda field: jnp.asarray(field)[:, : keys[1]], layout)

    def of_queries(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, count, axis=1)[:, None, :, None]

    group, branch = layout.group[:, None, None, :], layout.branch[:, None, None, :]
    shared = jnp.zeros_like(branch)
    visible &= (group == of_queries(layout.group)) & (
        (branch == shared) | (branch == of_queries(layout.branch))
    )
    if window is not None:
        positions = layout.positions[:, None, None, :]
        visible &= positions > of_queries(layout.positions) - jnp.asarray(window, positions.dtype)
    return visible
