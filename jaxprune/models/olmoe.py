"""OLMoE: LLaMA with experts, and norms of all queries and of all keys together (Hugging Face's
OlmoeForCausalLM).

References:
    Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models" (arXiv 2409.02060).
"""

from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Count
from jaxprune.errors import InputError
from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Routing
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    num_experts: Count
    num_experts_per_tok: Count
    norm_topk_prob: bool
    clip_qkv: float | None = None


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        if read.clip_qkv is not None:
            raise InputError(f"clip_qkv {read.clip_qkv:g} is not implemented; null is")
        routing = Routing(
            read.num_experts, read.num_experts_per_tok, read.intermediate_size, read.norm_topk_prob
        )
        return configuration.with_experts(cls.of(read, dtype, qk_norm="all"), routing)
