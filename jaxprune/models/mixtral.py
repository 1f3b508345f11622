"""Mixtral: Mistral with experts (Hugging Face's MixtralForCausalLM).

References:
    Jiang et al., "Mixtral of Experts" (arXiv 2401.04088).
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Count
from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Kind, Routing
from jaxprune.models.common.decoder import (
    ATTENTION_INPUTS,
    Attention,
    Embed,
    Head,
    RMSNorm,
    Taps,
    in_turn,
)
from jaxprune.models.common.experts import ROUTER_TAP, SparseMLP
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    num_local_experts: Count
    num_experts_per_tok: Count


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        routing = Routing(read.num_local_experts, read.num_experts_per_tok, read.intermediate_size)
        config = configuration.with_window(cls.of(read, dtype), read.sliding_window)
        return configuration.with_experts(config, routing)


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {
        **ATTENTION_INPUTS,
        ROUTER_TAP: ("block_sparse_moe.gate",),
        "expert_input": ("block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3"),
        "expert_hidden": ("block_sparse_moe.experts.w2",),
    }


class DecoderLayer(nnx.Module):
    """LLaMA's layer with experts."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, kind, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.block_sparse_moe = SparseMLP(config, rngs, names=("w1", "w3", "w2"))

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        before = self.input_layernorm, self.post_attention_layernorm
        return in_turn(x, layout, self.self_attn, self.block_sparse_moe, before=before)
