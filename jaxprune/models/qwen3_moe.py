"""Qwen 3 with experts in most layers (Hugging Face's Qwen3MoeForCausalLM).

References:
    Yang et al., "Qwen3 Technical Report" (arXiv 2505.09388).
"""

from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Count, Size
from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Config, Routing, entries
from jaxprune.models.common.family import Family


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Size
    norm_topk_prob: bool
    decoder_sparse_step: Count
    mlp_only_layers: list[int] = []

    def routing(self, *, shared: int = 0) -> Routing:
        """Returns how tokens are sent to experts; see `Routing`."""
        sizes = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        return Routing(*sizes, self.norm_topk_prob, shared=shared)

    def dense_layers(self) -> set[int]:
        """Returns the indices of the layers without experts."""
        every = range(self.num_hidden_layers)
        return {i for i in every if i in self.mlp_only_layers or (i + 1) % self.decoder_sparse_step}


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    return Config.of(
        read,
        dtype,
        window=read.sliding_window,
        qk_norm="head",
        routing=read.routing(),
        dense=read.dense_layers(),
    )


FAMILY = Family(config)
