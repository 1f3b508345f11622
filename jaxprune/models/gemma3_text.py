"""Gemma 3's text model: Gemma 2 with normalized queries and keys, five layers of six with a window,
and a rotation of their own for these (Hugging Face's Gemma3ForCausalLM).

References:
    Gemma Team, "Gemma 3 Technical Report" (arXiv 2503.19786).
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models import gemma2
from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import Embed, Head, inputs
from jaxprune.models.gemma2 import DecoderLayer

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(gemma2.Entries, hf)
        return cls.of(
            read,
            dtype,
            rope=configuration.rope_by_type(read),
            qk_norm="head",
            **gemma2.options(read),
        )
