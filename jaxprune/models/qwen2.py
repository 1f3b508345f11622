"""Qwen 2 and 2.5: LLaMA with biases of queries, keys and values (Hugging Face's Qwen2ForCausalLM).

References:
    Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671).
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
        return cls.of(
            configuration.entries(configuration.LayerEntries, hf),
            dtype,
            qkv_bias=True,
            output_bias=False,
        )
