"""Mistral: LLaMA whose tokens may see a window of the last ones only (Hugging Face's
MistralForCausalLM).

References:
    Jiang et al., "Mistral 7B" (arXiv 2310.06825).
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(configuration.Entries, hf)
        return configuration.with_window(cls.of(read, dtype), read.sliding_window)
