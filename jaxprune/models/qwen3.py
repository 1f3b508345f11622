"""Qwen 3: LLaMA whose queries and keys are normalized within each head (Hugging Face's
Qwen3ForCausalLM).

References:
    Yang et al., "Qwen3 Technical Report" (arXiv 2505.09388).
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
        return cls.of(configuration.entries(configuration.LayerEntries, hf), dtype, qk_norm="head")
