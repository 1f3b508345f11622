"""A streamed model's logits, all layers at once."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import StreamedModel


def logits(model: StreamedModel, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The logits, and the hidden states before each layer and after the last."""
    parts = model.architecture
    jitted = {layer: jax.jit(layer) for layer in parts.layers}
    x = parts.embed(model.params_of(parts.embed), jnp.asarray(tokens))
    states = [np.asarray(x)]
    for layer, params in zip(parts.layers, model.layers(), strict=True):
        x, _ = jitted[layer](jax.device_put(params), x)
        states.append(np.asarray(x))
    return np.asarray(parts.head(model.params_of(parts.head), x)), states
