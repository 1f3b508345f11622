"""Apertus: LLaMA with normalized queries and keys, and a feed-forward network without a gate, whose
activation has weights of its own (Hugging Face's ApertusForCausalLM).

References:
    Swiss AI Initiative, "Apertus" (arXiv 2509.14233); the activation: Huang and Schlag (arXiv
    2411.13010).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models.common.configuration import Config, Entry, reader
from jaxprune.models.common.decoder import ATTENTION_INPUTS, Captures, DecoderLayer, linear
from jaxprune.models.common.family import Family


class XIELU(nnx.Module):
    """An activation: quadratic above zero, exponential below, in float32 whatever the dtype around
    it."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = nnx.Param(jnp.zeros((1,))), nnx.Param(jnp.zeros((1,)))
        self.beta, self.eps = nnx.Param(jnp.float32(0.5)), nnx.Param(jnp.float32(-1e-6))

    def __call__(self, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        x32 = x.astype(jnp.float32)
        above, below, beta, least = (
            param[...].astype(jnp.float32).reshape(1, 1, 1)
            for param in (self.alpha_p, self.alpha_n, self.beta, self.eps)
        )
        quadratic = jax.nn.softplus(above) * x32 * x32
        exponential = (jnp.expm1(jnp.minimum(x32, least)) - x32) * (beta + jax.nn.softplus(below))
        return (jnp.where(x32 > 0, quadratic, exponential) + beta * x32).astype(x.dtype)


class MLP(nnx.Module):
    """Feed-forward network; returns its output and its capture."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.act_fn = XIELU()

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        y = self.act_fn(self.up_proj(x))
        return self.down_proj(y), {"mlp_hidden": y}


FAMILY = Family(
    reader(
        qk_norm="head",
        activation=Entry("hidden_act", Literal["xielu"]),
        norms_before=("attention_layernorm", "feedforward_layernorm"),
    ),
    inputs={**ATTENTION_INPUTS, "mlp_input": ("mlp.up_proj",), "mlp_hidden": ("mlp.down_proj",)},
    layer=partial(DecoderLayer, feed_forward=MLP),
)
