"""Qwen 1.5 and 2 with experts: a few for each token, and one that all tokens take (Hugging Face's
Qwen2MoeForCausalLM).

References:
    Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671), section 2.2.2.
"""

from typing import Annotated, Any

from jaxtyping import DTypeLike
from pydantic import Field

from convert.assets import Size
from jaxprune.models import qwen3_moe
from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import Embed, Head
from jaxprune.models.common.shared_experts import DecoderLayer, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(qwen3_moe.Entries, configuration.LayerEntries):
    """The entries of config.json that the family reads. Where no window is used, transformers gives
    one of 0 tokens."""

    qkv_bias: bool
    shared_expert_intermediate_size: Size
    sliding_window: Annotated[int, Field(ge=0)] | None = None


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        config = cls.of(read, dtype, qkv_bias=read.qkv_bias, output_bias=False)
        routing = read.routing(shared=read.shared_expert_intermediate_size)
        return configuration.with_experts(config, routing, read.dense_layers())
