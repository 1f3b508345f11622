"""Apertus: LLaMA with normalized queries and keys, and a feed-forward network without a gate, whose
activation has weights of its own (Hugging Face's ApertusForCausalLM).

References:
    Swiss AI Initiative, "Apertus" (arXiv 2509.14233); the activation: Huang and Schlag (arXiv
    2411.13010).
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import (
    ATTENTION_INPUTS,
    Attention,
    Embed,
    Head,
    RMSNorm,
    Taps,
    in_turn,
    linear,
)
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    hidden_act: Literal["xielu"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        return cls.of(read, dtype, qk_norm="head", activation=read.hidden_act)


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {**ATTENTION_INPUTS, "mlp_input": ("mlp.up_proj",), "mlp_hidden": ("mlp.down_proj",)}


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
    """Feed-forward network; returns its output and its tap."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.act_fn = XIELU()

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Taps]:
        y = self.act_fn(self.up_proj(x))
        return self.down_proj(y), {"mlp_hidden": y}


class DecoderLayer(nnx.Module):
    """LLaMA's layer with that network, and other names of the norms."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.attention_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, kind, rngs)
        self.feedforward_layernorm = RMSNorm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        before = self.attention_layernorm, self.feedforward_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, before=before)
