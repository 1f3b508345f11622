"""Mixtral: Mistral with experts (Hugging Face's MixtralForCausalLM).

References:
    Jiang et al., "Mixtral of Experts" (arXiv 2401.04088).
"""

from functools import partial
from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Count
from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import Config, Routing, entries
from jaxprune.models.common.decoder import ATTENTION_INPUTS, DecoderLayer
from jaxprune.models.common.experts import ROUTER_CAPTURE, SparseMLP
from jaxprune.models.common.family import Family


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    num_local_experts: Count
    num_experts_per_tok: Count


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    routing = Routing(read.num_local_experts, read.num_experts_per_tok, read.intermediate_size)
    return Config.of(read, dtype, window=read.sliding_window, routing=routing)


FAMILY = Family(
    config,
    inputs={
        **ATTENTION_INPUTS,
        ROUTER_CAPTURE: ("block_sparse_moe.gate",),
        "expert_input": ("block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3"),
        "expert_hidden": ("block_sparse_moe.experts.w2",),
    },
    layer=partial(
        DecoderLayer,
        experts=partial(SparseMLP, names=("w1", "w3", "w2")),
        names=("self_attn", "block_sparse_moe"),
    ),
)
