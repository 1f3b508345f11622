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
from jaxprune.models.common.configuration import Config, Routing, entries
from jaxprune.models.common.family import Family


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    num_experts: Count
    num_experts_per_tok: Count
    norm_topk_prob: bool
    clip_qkv: float | None = None


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    if read.clip_qkv is not None:
        raise InputError(f"clip_qkv {read.clip_qkv:g} is not implemented; null is")
    routing = Routing(
        read.num_experts, read.num_experts_per_tok, read.intermediate_size, read.norm_topk_prob
    )
    return Config.of(read, dtype, qk_norm="all", routing=routing)


FAMILY = Family(config)
