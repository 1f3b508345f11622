"""A model visited layer by layer: one layer's params on the device, the next one read in the background."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import Params, Reader
from jaxprune.errors import InputError
from jaxprune.hidden import HiddenStates, batch_size
from jaxprune.models import Model, Part

LOSS_TOKENS = 1024


def read_layers(model: Model, reader: Reader) -> Iterator[Params]:
    """The decoder layers' params in order, with paths inside the layer; one is read ahead of its use."""

    def read(index: int) -> Params:
        prefix = f"layers.{index}."
        params = reader.read([prefix + path for path in model.layer.spec])
        return {path.removeprefix(prefix): array for path, array in params.items()}

    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead = pool.submit(read, 0)
        for index in range(model.config.num_layers):
            params = ahead.result()
            if index + 1 < model.config.num_layers:
                ahead = pool.submit(read, index + 1)
            yield params


def embed(model: Model, reader: Reader, tokens: Int[np.ndarray, "w t"]) -> HiddenStates:
    """The hidden states before the first layer.

    Raises:
        InputError: token ids outside the vocabulary, or windows longer than the model was made for.
    """
    config = model.config
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(
            f"token ids run from {tokens.min()} to {tokens.max()}, but the model's vocabulary has {config.vocab_size}: "
            "the text was tokenized with another model's tokenizer"
        )
    windows, length = tokens.shape
    if config.max_positions is not None and length > config.max_positions:
        raise InputError(f"windows of {length} tokens are longer than the model's {config.max_positions} positions")
    params = jax.device_put(reader.read(model.embed.spec))
    width = next(iter(model.embed.spec.values())).shape[-1]
    hidden = HiddenStates((windows, length, width), np.dtype(config.dtype), batch_size(windows, length))
    hidden.replace(lambda rows: _apply(model.embed, params, jnp.asarray(tokens[rows], jnp.int32)))
    return hidden


def forward(model: Model, params: Mapping[str, Array], hidden: HiddenStates) -> None:
    """Moves the hidden states through one decoder layer."""
    hidden.update(lambda x: _apply_layer(model.layer, params, x))


def token_losses(model: Model, reader: Reader, hidden: HiddenStates, tokens: Int[np.ndarray, "w t"]) -> float:
    """The sum over all windows of −log p of every token but a window's first, from the last layer's output."""
    params = jax.device_put(reader.read(model.head.spec))
    total = 0.0
    for rows, x in zip(hidden.slices(), hidden.batches(), strict=True):
        chunks = _losses(model.head, params, x, jnp.asarray(tokens[rows], jnp.int32))
        total += float(np.asarray(chunks, np.float64).sum())
    return total


@partial(jax.jit, static_argnums=0)
def _apply(part: Part, params: Mapping[str, Array], x: Array) -> Array:
    return part(params, x)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _apply_layer(layer: Part, params: Mapping[str, Array], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return layer(params, x)[0]


@partial(jax.jit, static_argnums=0)
def _losses(
    head: Part, params: Mapping[str, Array], x: Float[Array, "b t d"], tokens: Int[Array, "b t"]
) -> Float[Array, "chunks"]:
    """Losses in chunks of tokens, so that the logits of one chunk, [1024, vocabulary], are the largest array."""
    states, targets = x[:, :-1].reshape(-1, x.shape[-1]), tokens[:, 1:].reshape(-1)
    size = min(LOSS_TOKENS, len(targets))
    padding = -len(targets) % size
    states = jnp.pad(states, ((0, padding), (0, 0)))
    real = jnp.arange(len(states), dtype=jnp.int32) < len(targets)
    targets = jnp.pad(targets, (0, padding))

    def chunk(args: tuple[Array, Array, Array]) -> Float[Array, ""]:
        states, targets, real = args
        logits = head(params, states[None])[0].astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - picked
        return jnp.sum(jnp.where(real, losses, jnp.zeros_like(losses)))

    shape = (-1, size)
    return jax.lax.map(chunk, (states.reshape(*shape, x.shape[-1]), targets.reshape(shape), real.reshape(shape)))
