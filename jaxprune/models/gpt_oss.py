"""gpt-oss: experts whose gate and up projections are one linear layer, biases everywhere, windows
in every other layer, and in each head the score of a token that is not there (Hugging Face's
GptOssForCausalLM).

References:
    OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv 2508.10925); attention sinks: Xiao et al.
    (arXiv 2309.17453).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Count, Positive
from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import LayerEntries, Routing, entries
from jaxprune.models.common.decoder import ATTENTION_INPUTS, Captures, DecoderLayer, linear
from jaxprune.models.common.experts import ROUTER_CAPTURE, ExpertLinear, Rows, mixture, routing_of
from jaxprune.models.common.family import Family


class Entries(LayerEntries):
    """The entries of config.json that the family reads."""

    num_local_experts: Count
    num_experts_per_tok: Count
    swiglu_alpha: Positive
    swiglu_limit: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    """See `configuration.Config`.

    Attributes:
        alpha: α of the gate's activation g·σ(αg).
        limit: the most that the gate may be, and the up projection by magnitude.
    """

    alpha: float
    limit: float


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    routing = Routing(read.num_local_experts, read.num_experts_per_tok, read.intermediate_size)
    alpha, limit = read.swiglu_alpha, read.swiglu_limit
    return Config.of(read, dtype, sinks=True, routing=routing, alpha=alpha, limit=limit)


class Experts(nnx.Module):
    """Gated feed-forward networks; returns the outputs of all rows and the input of the last linear
    layer."""

    def __init__(self, config: Config):
        routing, width = routing_of(config), config.hidden_size
        self.gate_up_proj = ExpertLinear(
            routing.experts,
            width,
            2 * routing.size,
            bias=True,
            projections=(("gate", 1), ("up", 1)),
        )
        self.down_proj = ExpertLinear(routing.experts, routing.size, width, bias=True)
        self.alpha, self.limit = config.alpha, config.limit

    def __call__(
        self, x: Float[Array, "N B n"], rows: Rows
    ) -> tuple[Float[Array, "N B n"], Float[Array, "N B h"]]:
        both = self.gate_up_proj(x, rows)
        alpha, limit = (jnp.asarray(value, both.dtype) for value in (self.alpha, self.limit))
        gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
        hidden = (up + jnp.ones_like(up)) * gate * jax.nn.sigmoid(gate * alpha)
        return self.down_proj(hidden, rows), hidden


class MLP(nnx.Module):
    """The router and its experts; returns its output and its captures."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.router = linear(
            config, config.hidden_size, routing_of(config).experts, rngs, bias=True
        )
        self.experts = Experts(config)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        return mixture(self.config, self.router, self.experts, x)


FAMILY = Family(
    config,
    inputs={
        **ATTENTION_INPUTS,
        ROUTER_CAPTURE: ("mlp.router",),
        "expert_input": ("mlp.experts.gate_up_proj",),
        "expert_hidden": ("mlp.experts.down_proj",),
    },
    layer=partial(DecoderLayer, experts=MLP),
)
