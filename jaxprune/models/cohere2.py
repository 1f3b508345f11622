"""Command R7B and its kin: attention and feed-forward network side by side, windows in three layers
of four, and a rotation in these only (Hugging Face's Cohere2ForCausalLM).

References:
    Cohere, "Command A" (arXiv 2504.00698).
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Positive
from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.configuration import SLIDING, Kind
from jaxprune.models.common.decoder import Attention, Embed, GatedMLP, LayerNorm, Taps
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.LayerEntries):
    """The entries of config.json that the family reads."""

    logit_scale: Positive


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        rope = configuration.rope_of(read, interleaved=True)
        return cls.of(
            read,
            dtype,
            rope=lambda kind: rope if kind == SLIDING else None,
            logit_scale=read.logit_scale,
        )


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    reading = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    return {
        "input": reading,
        "attention_output": ("self_attn.o_proj",),
        "mlp_hidden": ("mlp.down_proj",),
    }


class DecoderLayer(nnx.Module):
    """A layer whose attention and feed-forward network read the same norm."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = LayerNorm(config, rngs, use_bias=False)
        self.self_attn = Attention(config, kind, rngs)
        self.mlp = GatedMLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        y = self.input_layernorm(x)
        attended, attention_output = self.self_attn(y, layout)
        fed, own = self.mlp(y)
        return x + attended + fed, {"input": y, "attention_output": attention_output, **own}


class Head(decoder.Head):
    """See `decoder.Head`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs, LayerNorm(config, rngs, use_bias=False))
