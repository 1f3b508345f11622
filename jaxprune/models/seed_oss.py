"""Seed-OSS: LLaMA with biases of queries, keys and values (Hugging Face's SeedOssForCausalLM).

References:
    ByteDance Seed, "Seed-OSS", 2025, as released.
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    attention_out_bias: bool


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        return cls.of(read, dtype, output_bias=read.attention_out_bias)
