"""Granite 3: LLaMA with factors of the embedding, the scores, what each block adds, and the logits
(Hugging Face's GraniteForCausalLM).

References:
    Granite Team, "Granite 3.0 Language Models", 2024; the factors: Yang et al. (arXiv 2203.03466).
"""

from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Positive
from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    embedding_multiplier: Positive
    attention_multiplier: Positive
    residual_multiplier: Positive
    logits_scaling: Positive


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        return cls.of(
            read,
            dtype,
            embedding_scale=read.embedding_multiplier,
            attention_scale=read.attention_multiplier,
            residual_scale=read.residual_multiplier,
            logit_scale=1 / read.logits_scaling,
        )
