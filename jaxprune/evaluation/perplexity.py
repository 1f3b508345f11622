"""Perplexity by streaming: the model need not fit the device, nor the host."""

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Params, Reader
from jaxprune.hidden import HiddenStates
from jaxprune.models import Model, model_for
from jaxprune.stream import embed, forward, read_layers, token_losses


def perplexity(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    *,
    dtype: DTypeLike | None = None,
    track: Callable[[Iterator[Params], int], Iterable[Params]] = lambda layers, count: layers,
) -> float:
    """exp of the mean loss over all tokens but each window's first.

    Windows are scored on their own, so windows of another length give another number.

    Args:
        reader: the checkpoint.
        tokens: [windows, length] token ids.
        dtype: of the computation; see `models.model_for`.
        track: (layers, their number) -> the same layers; a place for a progress bar.

    Raises:
        InputError: the checkpoint or the tokens cannot be used.
    """
    model = model_for(reader, dtype)
    hidden = embed(model, reader, tokens)
    for params in track(read_layers(model, reader), model.config.num_layers):
        forward(model, jax.device_put(params), hidden)
    return mean_loss_perplexity(model, reader, hidden, tokens)


def mean_loss_perplexity(model: Model, reader: Reader, hidden: HiddenStates, tokens: Int[np.ndarray, "w t"]) -> float:
    """Perplexity from the last layer's output."""
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    mean = token_losses(model, reader, hidden, tokens) / count
    # A model pruned to rubble may have a mean loss whose exponential overflows.
    return math.exp(mean) if mean < 700 else math.inf
