"""The model's head: logits of a few tokens at a time, and what is computed from them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxprune.models import Part
from jaxprune.sharding import Devices, fetch

CHUNK = 1024
"""Tokens whose logits are on the device at a time."""


class TokenScores(NamedTuple):
    """What a model says of tokens that follow.

    Attributes:
        log_prob: natural logarithm of the token's probability.
        greedy: whether no token is more probable.
    """

    log_prob: Float[np.ndarray, "n"]
    greedy: Bool[np.ndarray, "n"]


def rows_at_a_time(count: int, models: int = 1, devices: int = 1) -> int:
    """Returns how many of so many rows `in_chunks` takes at a time, a multiple of the devices: the
    last are padded anyway."""
    size = min(max(1, CHUNK // models), count)
    return size + -size % devices


def in_chunks(
    devices: Devices,
    step: Callable[..., Sequence[Array]],
    *arrays: Shaped[np.ndarray, "n *_"],
    models: int = 1,
) -> list[np.ndarray]:
    """Applies a function of rows to chunks of one size, the last one padded, so that it compiles
    once.

    Args:
        devices: the devices that the rows of a chunk are sharded over.
        step: arrays of rows -> arrays of as many rows.
        arrays: the arrays of as many rows.
        models: the models whose logits `step` holds at a time; the more, the smaller the chunks.

    Returns:
        The results of all chunks, joined, on the host.
    """
    count = len(arrays[0])
    size = rows_at_a_time(count, models, devices.count)
    results: list[Sequence[Array]] = []
    for start in range(0, count, size):
        if len(results) > 1:
            # else the logits of many chunks could be on the device at once
            jax.block_until_ready(results[-2])
        parts = [array[start : start + size] for array in arrays]
        padding = size - len(parts[0])
        if padding:
            parts = [np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        result = step(*map(devices.shard_first, parts))
        for array in result:
            array.copy_to_host_async()
        results.append(result)
    return [
        np.concatenate([fetch(part) for part in parts])[:count]
        for parts in zip(*results, strict=True)
    ]


def logits(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"]
) -> Float[Array, "n v"]:
    """Computes logits in float32; to be traced under jit."""
    return head(params, states[None])[0].astype(jnp.float32)


class Exponentials(NamedTuple):
    """A softmax not yet divided: it is values / total.

    Attributes:
        scores: logits s.
        values: exp(s − max s).
        total: their sum over the vocabulary.
        log_total: log Σ exp s.
    """

    scores: Float[Array, "n v"]
    values: Float[Array, "n v"]
    total: Float[Array, "n 1"]
    log_total: Float[Array, "n 1"]


def exponentials(scores: Float[Array, "n v"]) -> Exponentials:
    """Computes the exponentials of logits once: XLA would compute them again in every use."""
    most = jnp.max(scores, axis=1, keepdims=True)
    values = jax.lax.optimization_barrier(jnp.exp(scores - most))
    total = jnp.sum(values, axis=1, keepdims=True)
    return Exponentials(scores, values, total, most + jnp.log(total))


def kl_divergence(p: Exponentials, q: Exponentials) -> Float[Array, "n"]:
    """Computes KL(p‖q) = Σ_v p_v (log p_v − log q_v) of each row, in nats; to be traced under
    jit."""
    # Σ p (log p − log q), but for the totals
    apart = jnp.sum(p.values * (p.scores - q.scores), axis=1) / p.total[:, 0]
    return apart + (q.log_total - p.log_total)[:, 0]


@partial(jax.jit, static_argnums=0)
def score(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """Computes the fields of `TokenScores`."""
    scores = logits(head, params, states)
    picked = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    # argmax instead of a comparison with the maximum: of equal logits the first is the greedy
    # choice.
    greedy = jnp.argmax(scores, axis=1).astype(targets.dtype) == targets
    return picked - jax.nn.logsumexp(scores, axis=1), greedy


@partial(jax.jit, static_argnums=0)
def most_probable(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"]
) -> tuple[Int[Array, "n"], Bool[Array, "n"]]:
    """Returns the ids of the most probable next tokens, and whether the logits are finite."""
    scores = logits(head, params, states)
    return jnp.argmax(scores, axis=1), jnp.isfinite(jnp.max(scores, axis=1))


@partial(jax.jit, static_argnums=0)
def drawn(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], uniform: Float[Array, "n"]
) -> tuple[Int[Array, "n"], Bool[Array, "n"]]:
    """Returns the ids of next tokens as their probabilities have them: of each row the first id
    that has, together with those before it, more of the probability than a number from 0 to 1; and
    whether the logits are finite."""
    sums = jnp.cumsum(exponentials(logits(head, params, states)).values, axis=1)
    ids = jnp.minimum(jnp.sum(sums <= uniform[:, None] * sums[:, -1:], axis=1), sums.shape[1] - 1)
    return ids, jnp.isfinite(sums[:, -1])
