"""OLMo 2: norms after the blocks instead of before them, and of all queries and keys together
(Hugging Face's Olmo2ForCausalLM).

References:
    Team OLMo, "2 OLMo 2 Furious" (arXiv 2501.00656).
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import (
    Attention,
    Embed,
    GatedMLP,
    Head,
    RMSNorm,
    Taps,
    in_turn,
    inputs,
)
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        return cls.of(configuration.entries(configuration.Entries, hf), dtype, qk_norm="all")


class DecoderLayer(nnx.Module):
    """A layer with norms after the attention and the feed-forward network."""

    def __init__(self, config: configuration.Config, kind: Kind, rngs: nnx.Rngs):
        self.self_attn = Attention(config, kind, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = GatedMLP(config, rngs)
        self.post_feedforward_layernorm = RMSNorm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        after = self.post_attention_layernorm, self.post_feedforward_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, after=after)
