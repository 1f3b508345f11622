"""Gemma 2: norms before and after each block, windows in every other layer, capped scores and
logits (Hugging Face's Gemma2ForCausalLM).

References:
    Gemma Team, "Gemma 2" (arXiv 2408.00118).
"""

import math
from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Positive
from jaxprune.errors import InputError
from jaxprune.models.common.configuration import Config, LayerEntries, entries
from jaxprune.models.common.family import Family


class Entries(LayerEntries):
    """The entries of config.json that the family reads."""

    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool = False


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    return Config.of(read, dtype, attention_softcap=read.attn_logit_softcapping, **options(read))


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
        "norms_before": ("input_layernorm", "pre_feedforward_layernorm"),
        "norms_after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }


FAMILY = Family(config)
