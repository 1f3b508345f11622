"""Phi 3 and 4: LLaMA with one linear layer for queries, keys and values, and one for gate and up
projection (Hugging Face's Phi3ForCausalLM).

References:
    Abdin et al., "Phi-3 Technical Report" (arXiv 2404.14219).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import Embed, FusedMLP, Head, fused, linear
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(configuration.Entries, hf)
        rope = configuration.rope_of(read, partial=True)
        return configuration.with_window(
            cls.of(read, dtype, rope=lambda _: rope), read.sliding_window
        )


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {
        "attention_input": ("self_attn.qkv_proj",),
        "attention_output": ("self_attn.o_proj",),
        "mlp_input": ("mlp.gate_up_proj",),
        "mlp_hidden": ("mlp.down_proj",),
    }


class Attention(nnx.Module):
    """Causal grouped-query attention; returns its output and the input of o_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.width, self.kv_width = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        sections = {"query": self.width, "key": self.kv_width, "value": self.kv_width}
        self.qkv_proj = fused(config, config.hidden_size, sections, rngs)
        self.o_proj = linear(config, self.width, config.hidden_size, rngs)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        parts = jnp.split(self.qkv_proj(x), [self.width, self.width + self.kv_width], axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], -1, self.config.head_dim) for part in parts)
        y = decoder.attend(self.config, self.kind, query, key, value, layout)
        return self.o_proj(y), y


class DecoderLayer(decoder.DecoderLayer):
    """LLaMA's layer with fused linear layers."""

    attention = Attention
    feed_forward = FusedMLP
