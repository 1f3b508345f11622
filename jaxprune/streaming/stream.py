"""A model visited layer by layer: one layer's params on the device, the next one read in the background."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from convert import Params, Reader
from jaxprune import sharding as devices
from jaxprune.calibration import require_ids
from jaxprune.errors import InputError
from jaxprune.models import Layout, Model, Part
from jaxprune.streaming.hidden_states import HiddenStates, batch_size

CHUNK = 1024
"""Tokens whose logits are on the device at a time."""


def read_layers(model: Model, reader: Reader, order: Sequence[int] | None = None) -> Iterator[Params]:
    """The decoder layers' params, with paths inside the layer; one is read ahead of its use.

    Args:
        model: of the checkpoint.
        reader: of the checkpoint.
        order: numbers of the layers; None: all, from the first.
    """
    order = range(model.config.num_layers) if order is None else order
    if not order:
        return

    def read(index: int) -> Params:
        return inside_layer(index, reader.read([f"layers.{index}.{path}" for path in model.layer.spec]))

    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead = pool.submit(read, order[0])
        for following in [*order[1:], None]:
            params = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            yield params


def inside_layer(index: int, params: Params) -> Params:
    """A layer's params under their paths inside the layer."""
    return {path.removeprefix(f"layers.{index}."): array for path, array in params.items()}


def in_checkpoint(index: int, params: Params) -> Params:
    """A layer's params under their paths in the checkpoint."""
    return {f"layers.{index}.{path}": array for path, array in params.items()}


def ready(model: Model, params: Params) -> dict[str, Array]:
    """Params on the device in the model's own dtype, for a part that is applied many times."""
    return devices.everywhere({path: param.astype(model.config.dtype) for path, param in params.items()})


def require_tokens(model: Model, tokens: Int[np.ndarray, "w t"]) -> None:
    """Raises InputError for token ids outside the vocabulary, or windows longer than the model was made for."""
    require_ids(tokens, model.config.vocab_size)
    require_length(model, tokens.shape[1])


def require_length(model: Model, length: int) -> None:
    """Raises InputError for windows that are longer than the model was made for."""
    most = model.config.max_positions
    if most is not None and length > most:
        raise InputError(f"windows of {length} tokens are longer than the model's {most} positions; shorten them")


def embed(
    model: Model,
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    into: HiddenStates | None = None,
    *,
    at_a_time: int | None = None,
) -> HiddenStates:
    """The hidden states before the first layer.

    Args:
        model: of the checkpoint.
        reader: of the checkpoint.
        tokens: token ids.
        into: states of this shape, which are overwritten; None: new ones.
        at_a_time: tokens that new ones bring to the device at a time; None: what suits it.

    Raises:
        InputError: see `require_tokens`.
    """
    require_tokens(model, tokens)
    windows, length = tokens.shape
    params = devices.everywhere(reader.read(model.embed.spec))
    shape = windows, length, model.width
    hidden = into or HiddenStates(shape, np.dtype(model.config.dtype), batch_size(windows, length, at_a_time))
    hidden.replace(lambda rows: apply(model.embed, params, devices.by_windows(tokens[rows].astype(np.int32))))
    return hidden


def forward(model: Model, params: Mapping[str, Array], hidden: HiddenStates, layout: Layout | None = None) -> None:
    """Moves the hidden states through one decoder layer.

    Args:
        model: of the layer.
        params: of the layer, on the device.
        hidden: before the layer; after it when this returns.
        layout: of all windows, on the host, where they hold several texts.
    """

    def step(x: Array, rows: slice) -> Array:
        here = None if layout is None else Layout(*(devices.by_windows(field[rows]) for field in layout))
        return apply_layer(model.layer, params, x, here)

    hidden.update(step)


class TokenScores(NamedTuple):
    """What a model says of tokens that follow.

    Attributes:
        log_prob: natural logarithm of the token's probability.
        greedy: whether no token is more probable.
    """

    log_prob: Float[np.ndarray, "n"]
    greedy: Bool[np.ndarray, "n"]


def score_tokens(
    model: Model, params: Mapping[str, Array], states: Shaped[np.ndarray, "n d"], targets: Int[np.ndarray, "n"]
) -> TokenScores:
    """Scores tokens, a chunk at a time: the logits of one chunk, [1024, vocabulary], are the largest array.

    Args:
        model: of the head.
        params: of the head, on the device.
        states: the last layer's output where each token is predicted.
        targets: ids of the tokens.
    """
    return TokenScores(*in_chunks(lambda *chunk: _score(model.head, params, *chunk), states, targets))


def next_tokens(model: Model, params: Mapping[str, Array], states: Shaped[np.ndarray, "n d"]) -> Int[np.ndarray, "n"]:
    """The most probable next tokens."""
    (ids,) = in_chunks(lambda chunk: (_argmax(model.head, params, chunk),), states)
    return ids


def in_chunks(
    step: Callable[..., Sequence[Array]], *arrays: Shaped[np.ndarray, "n *_"], models: int = 1
) -> list[np.ndarray]:
    """Applies a function of rows to chunks of one size, the last one padded, so that it compiles once.

    Args:
        step: arrays of rows -> arrays of as many rows.
        arrays: of as many rows.
        models: whose logits `step` holds at a time; the more, the smaller the chunks.
    """
    count = len(arrays[0])
    size = min(max(1, CHUNK // models), count)
    results: list[Sequence[Array]] = []
    for start in range(0, count, size):
        if len(results) > 1:
            jax.block_until_ready(results[-2])  # else the logits of many chunks could be on the device at once
        parts = [array[start : start + size] for array in arrays]
        padding = size - len(parts[0])
        if padding:
            parts = [np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        result = step(*map(devices.by_windows, parts))
        for array in result:
            array.copy_to_host_async()
        results.append(result)
    return [np.concatenate([devices.fetch(part) for part in parts])[:count] for parts in zip(*results, strict=True)]


@partial(jax.jit, static_argnums=0)
def apply(part: Part, params: Mapping[str, Array], x: Array) -> Array:
    """The output of the embedding or of the head."""
    return part(params, x)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def apply_layer(
    layer: Part, params: Mapping[str, Array], x: Float[Array, "b t d"], layout: Layout | None = None
) -> Float[Array, "b t d"]:
    """A layer's output; x is donated."""
    return layer(params, x, layout)[0]


def logits(head: Part, params: Mapping[str, Array], states: Float[Array, "n d"]) -> Float[Array, "n v"]:
    """Logits in float32; to be traced under jit."""
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
    """The exponentials of logits, computed once: XLA would compute them again in every use."""
    most = jnp.max(scores, axis=1, keepdims=True)
    values = jax.lax.optimization_barrier(jnp.exp(scores - most))
    total = jnp.sum(values, axis=1, keepdims=True)
    return Exponentials(scores, values, total, most + jnp.log(total))


def kl_divergence(p: Exponentials, q: Exponentials) -> Float[Array, "n"]:
    """KL(p‖q) = Σ_v p_v (log p_v − log q_v) of each row, in nats; to be traced under jit."""
    apart = jnp.sum(p.values * (p.scores - q.scores), axis=1) / p.total[:, 0]  # Σ p (log p − log q), but for the totals
    return apart + (q.log_total - p.log_total)[:, 0]


@partial(jax.jit, static_argnums=0)
def _score(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    scores = logits(head, params, states)
    picked = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    # argmax instead of a comparison with the maximum: of equal logits the first is the greedy choice.
    greedy = jnp.argmax(scores, axis=1).astype(targets.dtype) == targets
    return picked - jax.nn.logsumexp(scores, axis=1), greedy


@partial(jax.jit, static_argnums=0)
def _argmax(head: Part, params: Mapping[str, Array], states: Float[Array, "n d"]) -> Int[Array, "n"]:
    return jnp.argmax(logits(head, params, states), axis=1)
