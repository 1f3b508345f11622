"""Qwen 1.5 and 2 with experts: a few for each token, and one that all tokens take (Hugging Face's
Qwen2MoeForCausalLM).

References:
    Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671), section 2.2.2.
"""

from functools import partial
from typing import Annotated, Any

from jaxtyping import DTypeLike
from pydantic import Field

from convert.assets import Size
from jaxprune.models import qwen3_moe
from jaxprune.models.common.configuration import Config, LayerEntries, entries
from jaxprune.models.common.decoder import DecoderLayer
from jaxprune.models.common.family import Family
from jaxprune.models.common.shared_experts import SharedMLP, inputs


class Entries(qwen3_moe.Entries, LayerEntries):
    """The entries of config.json that the family reads. Where no window is used, transformers gives
    one of 0 tokens."""

    qkv_bias: bool
    shared_expert_intermediate_size: Size
    sliding_window: Annotated[int, Field(ge=0)] | None = None


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    return Config.of(
        read,
        dtype,
        qkv_bias=read.qkv_bias,
        output_bias=False,
        routing=read.routing(shared=read.shared_expert_intermediate_size),
        dense=read.dense_layers(),
    )


FAMILY = Family(config, inputs=inputs, layer=partial(DecoderLayer, experts=SharedMLP))
