"""The activations that configurations name, and their product with what they gate."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.errors import InputError

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
}


def require_activation(name: str | None) -> None:
    """Raises InputError for an activation that is not implemented."""
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is not implemented; {', '.join(ACTIVATIONS)} are")


def gated(activation: str, gate: Float[Array, "*s"], up: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns activation(gate)·up, computed in float32 at least; its gradient keeps these two
    arrays alone."""
    dtype = np.promote_types(gate.dtype, np.float32)

    def product(gate: Array, up: Array) -> Array:
        return (ACTIVATIONS[activation](gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)

    return jax.checkpoint(product)(gate, up)
