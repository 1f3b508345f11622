r"""The gated delta rule: attention whose memory is a matrix, with a causal convolution before it.

A head's memory S, [d_k, d_v], is S_t = exp(g_t) (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, and its
output S_tᵀ q_t. In chunks of tokens the products of many updates are a triangular system each,
solved for all chunks at once; a scan over the chunks carries the memory.

Texts that share a window, and continuations that share a beginning, each have a memory of their
own: there the scan goes token by token, and a continuation takes up the memory at the end of its
beginning.

References:
    Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), equation 10; the chunks:
    Yang et al. (arXiv 2406.06484), section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.common.cache import Cache
from jaxprune.models.common.packed_windows import Layout

CHUNK = 64
"""Tokens of a chunk."""


class Inputs(NamedTuple):
    """What the rule takes, in float32 (or float64).

    Attributes:
        query, key: of norm 1, queries divided by √d_k.
        value: as many heads as there are memories; query and key heads serve several of them each,
            in order.
        decay: g, at most 0.
        rate: β, between 0 and 1.
    """

    query: Float[Array, "b t h k"]
    key: Float[Array, "b t h k"]
    value: Float[Array, "b t m v"]
    decay: Float[Array, "b t m"]
    rate: Float[Array, "b t m"]


def gated_delta_rule(inputs: Inputs, layout: Layout | None = None) -> Float[Array, "b t m v"]:
    """Returns the outputs of all memories, each of which is zero before its text.

    Args:
        inputs: of a window.
        layout: where it holds several texts; or a cache, where texts are continued.
    """
    shared = inputs.value.shape[2] // inputs.key.shape[2]
    inputs = inputs._replace(
        query=jnp.repeat(inputs.query, shared, 2), key=jnp.repeat(inputs.key, shared, 2)
    )
    if isinstance(layout, Cache):
        return _continued(inputs, layout)
    return _by_chunks(inputs)[0] if layout is None else _by_tokens(inputs, layout)


def _continued(inputs: Inputs, cache: Cache) -> Float[Array, "b t m v"]:
    """Returns the outputs of texts that are continued, and keeps their memories."""
    if cache.before is None:
        none = ~cache.valid[:, :, None]  # padding changes no memory
        decay, rate = (jnp.where(none, jnp.zeros_like(x), x) for x in (inputs.decay, inputs.rate))
        out, memory = _by_chunks(inputs._replace(decay=decay, rate=rate))
    else:
        memory, out = _updated(cache.take(), jax.tree.map(lambda x: x[:, 0], inputs))
        out = out[:, None]
    cache.keep(memory)
    return out


def _by_chunks(inputs: Inputs) -> tuple[Float[Array, "b t m v"], Float[Array, "b m k v"]]:
    """Returns the outputs, and the memories at the end of the window."""
    b, t = inputs.key.shape[:2]
    size = min(CHUNK, t)
    padding = -t % size

    def chunks(x: Array) -> Array:
        """Returns [chunks, b, memories, tokens, ...]."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(b, -1, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    query, key, value, decay, rate = (chunks(x) for x in inputs)
    total = jnp.cumsum(decay, axis=-1)
    lower = jnp.tril(jnp.ones((size, size), bool))
    since = jnp.where(lower[None, None, None], total[..., :, None] - total[..., None, :], -jnp.inf)
    between = jnp.exp(since)  # how much of what token j wrote is left at token i
    of_rate = key * rate[..., None]
    system = jnp.einsum("...id,...jd->...ij", of_rate, key, precision="highest") * between
    attended = jnp.einsum("...id,...jd->...ij", query, key, precision="highest") * between
    left = jnp.exp(total)[..., None]
    both = jnp.concatenate([value * rate[..., None], of_rate * left], axis=-1)
    solved = solve_triangular(system, both, lower=True, unit_diagonal=True)
    written, read = jnp.split(solved, [value.shape[-1]], axis=-1)
    until_end = jnp.exp(total[..., -1:] - total)[..., None]
    steps = written, read, query * left, attended, key * until_end, left[..., -1:, :]

    def step(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        written, read, query, attended, key, left = chunk
        new = written - jnp.matmul(read, memory, precision="highest")
        out = jnp.matmul(query, memory, precision="highest") + jnp.matmul(
            attended, new, precision="highest"
        )
        added = jnp.einsum("...td,...tv->...dv", key, new, precision="highest")
        return memory * left + added, out

    memory, out = lax.scan(step, _nothing(inputs), steps)
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1)
    return out.reshape(b, -1, *out.shape[3:])[:, :t], memory


def _by_tokens(inputs: Inputs, layout: Layout) -> Float[Array, "b t m v"]:
    begins, forks, shared = _changes(layout)
    steps = jax.tree.map(
        lambda x: jnp.moveaxis(jnp.asarray(x), 1, 0), (inputs, begins, forks, shared)
    )

    def step(state: tuple[Array, Array], token: tuple) -> tuple[tuple[Array, Array], Array]:
        (memory, beginning), (one, begins, forks, shared) = state, token

        def where(which: Array, new: Array, old: Array) -> Array:
            return jnp.where(which[:, None, None, None], new, old)

        memory = where(begins, jnp.zeros_like(memory), where(forks, beginning, memory))
        beginning = where(begins, jnp.zeros_like(memory), beginning)
        memory, out = _updated(memory, one)
        return (memory, where(shared, memory, beginning)), out

    _, out = lax.scan(step, (_nothing(inputs), _nothing(inputs)), steps)
    return jnp.moveaxis(out, 0, 1)


def _updated(
    memory: Float[Array, "b m k v"], one: Inputs
) -> tuple[Float[Array, "b m k v"], Float[Array, "b m v"]]:
    """Returns the memories after one more token of each text, and its outputs; `one` has no axis of
    tokens."""
    memory = memory * jnp.exp(one.decay)[..., None, None]
    held = jnp.sum(memory * one.key[..., None], axis=-2)
    new = (one.value - held) * one.rate[..., None]
    memory = memory + one.key[..., None] * new[..., None, :]
    return memory, jnp.sum(memory * one.query[..., None], axis=-2)


def _nothing(inputs: Inputs) -> Float[Array, "b m k v"]:
    b, _, memories, width = inputs.value.shape
    return jnp.zeros((b, memories, inputs.key.shape[-1], width), inputs.value.dtype)


def _changes(layout: Layout) -> tuple[Bool[Array, "b t"], Bool[Array, "b t"], Bool[Array, "b t"]]:
    """Returns whether a group begins with a token, whether a continuation does, and whether it is
    of a beginning."""
    group, branch = jnp.asarray(layout.group), jnp.asarray(layout.branch)
    shared = branch == jnp.zeros_like(branch)
    first = jnp.ones((len(group), 1), bool)
    begins = jnp.concatenate([first, group[:, 1:] != group[:, :-1]], axis=1)
    forks = jnp.concatenate([first, branch[:, 1:] != branch[:, :-1]], axis=1) & ~begins & ~shared
    return begins, forks, shared


def convolve(
    x: Float[Array, "b t c"], kernel: Float[Array, "c w"], layout: Layout | None
) -> Float[Array, "b t c"]:
    """Returns the causal convolution of each feature: with a token and those before it in its text.

    Args:
        x: features.
        kernel: the weights of each feature, that of the token itself last.
        layout: where a window holds several texts; or a cache, where texts are continued.
    """
    t = x.shape[1]
    if isinstance(layout, Cache):
        count = kernel.shape[1] - 1
        if layout.before is not None:
            seen = jnp.concatenate([layout.take(), x], axis=1)
            layout.keep(seen[:, 1:])
            return jnp.sum(seen * kernel.T[None].astype(x.dtype), axis=1, keepdims=True)
        last = layout.lengths[:, None] + jnp.arange(-count, 0, dtype=jnp.int32)[None]
        before_text = jnp.pad(x, ((0, 0), (count, 0), (0, 0)))  # by `count` zeros
        layout.keep(jnp.take_along_axis(before_text, (last + jnp.int32(count))[:, :, None], axis=1))
        layout = None
    before = jnp.arange(t, dtype=jnp.int32)[None] - jnp.int32(1)
    before = jnp.where(before < 0, jnp.int32(t), before) if layout is None else _before(layout)
    place, y = (
        jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], before.shape),
        jnp.zeros_like(x),
    )
    for weights in kernel.T[::-1]:
        taken = jnp.take_along_axis(x, place[:, :, None], axis=1, mode="fill", fill_value=0)
        y = y + taken * weights[None, None, :].astype(x.dtype)
        place = jnp.take_along_axis(before, place, axis=1, mode="fill", fill_value=t)
    return y


def _before(layout: Layout) -> Int[Array, "b t"]:
    """Returns which token comes before each in its text; as many as there are tokens, where none
    does."""
    begins, forks, shared = _changes(layout)
    number = jnp.arange(begins.shape[1], dtype=jnp.int32)[None]
    none = jnp.int32(begins.shape[1])
    last_shared = lax.cummax(jnp.where(shared, number, jnp.int32(-1)), axis=1)
    group = jnp.asarray(layout.group)
    same = jnp.take_along_axis(group, jnp.maximum(last_shared, 0), axis=1) == group
    end_of_beginning = jnp.where(same & (last_shared >= 0), last_shared, none)
    return jnp.where(begins, none, jnp.where(forks, end_of_beginning, number - 1))
