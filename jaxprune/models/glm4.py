"""GLM 4 (0414): norms before and after each block, and a rotation of half of a head's features, in
pairs side by side (Hugging Face's Glm4ForCausalLM).

References:
    Team GLM, "ChatGLM" (arXiv 2406.12793).
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import (
    ATTENTION_INPUTS,
    Attention,
    Embed,
    FusedMLP,
    Head,
    RMSNorm,
    Taps,
    in_turn,
)
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(configuration.Entries, hf)
        rope = configuration.rope_of(read, interleaved=True, partial=True)
        return cls.of(read, dtype, rope=lambda _: rope, output_bias=False)


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {
        **ATTENTION_INPUTS,
        "mlp_input": ("mlp.gate_up_proj",),
        "mlp_hidden": ("mlp.down_proj",),
    }


class DecoderLayer(nnx.Module):
    """A layer with norms before and after the attention and the feed-forward network."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, kind, rngs)
        self.post_self_attn_layernorm = RMSNorm(config, rngs)
        # before the feed-forward network, whatever its name
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = FusedMLP(config, rngs)
        self.post_mlp_layernorm = RMSNorm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        before = self.input_layernorm, self.post_attention_layernorm
        after = self.post_self_attn_layernorm, self.post_mlp_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, before=before, after=after)
