"""OLMo 2: norms behind the blocks instead of before them, and of all queries and keys together (Hugging Face's
Olmo2ForCausalLM).

References:
    Team OLMo, "2 OLMo 2 Furious" (arXiv 2501.00656).
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxprune.models import decoder
from jaxprune.models.attention import Layout
from jaxprune.models.decoder import Attention, Embed, GatedMLP, Head, Kind, RMSNorm, in_turn, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(decoder.Config):
    """See `decoder.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> "Config":
        """Reads a transformers configuration; errors as for `decoder.Config.from_hf`."""
        return cls.of(decoder.entries(decoder.Entries, hf), dtype, qk_norm="all")


class DecoderLayer(nnx.Module):
    """A layer with norms behind the attention and the feed-forward network."""

    def __init__(self, config: decoder.Config, kind: Kind, rngs: nnx.Rngs):
        self.self_attn = Attention(config, kind, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = GatedMLP(config, rngs)
        self.post_feedforward_layernorm = RMSNorm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        after = self.post_attention_layernorm, self.post_feedforward_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, after=after)
