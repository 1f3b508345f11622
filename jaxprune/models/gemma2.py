"""Gemma 2: norms before and after each block, windows in every other layer, capped scores and
logits (Hugging Face's Gemma2ForCausalLM).

References:
    Gemma Team, "Gemma 2" (arXiv 2408.00118).
"""

import math
from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Positive
from jaxprune.errors import InputError
from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import Embed, GatedMLP, Head, RMSNorm, Taps, in_turn, inputs
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.LayerEntries):
    """The entries of config.json that the family reads."""

    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool = False


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        return cls.of(read, dtype, attention_softcap=read.attn_logit_softcapping, **options(read))


def options(read: Entries) -> dict[str, Any]:
    """Returns what the generations of the family have in common.

    Raises:
        InputError: something in it is not implemented.
    """
    if read.use_bidirectional_attention:
        raise InputError(
            "use_bidirectional_attention is not implemented; the attention has to be causal"
        )
    return {
        "norm_offset": 1.0,
        "attention_scale": read.query_pre_attn_scalar**-0.5,
        "logit_softcap": read.final_logit_softcapping,
        "embedding_scale": math.sqrt(read.hidden_size),
    }


class DecoderLayer(nnx.Module):
    """A layer with norms before and after the attention and the feed-forward network."""

    def __init__(self, config: configuration.Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = decoder.Attention(config, kind, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.pre_feedforward_layernorm = RMSNorm(config, rngs)
        self.mlp = GatedMLP(config, rngs)
        self.post_feedforward_layernorm = RMSNorm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        before = self.input_layernorm, self.pre_feedforward_layernorm
        after = self.post_attention_layernorm, self.post_feedforward_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, before=before, after=after)
