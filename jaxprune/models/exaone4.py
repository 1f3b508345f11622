"""EXAONE 4: OLMo 2's layers with queries and keys normalized within each head; where some layers
attend to a window, the others have no rotation (Hugging Face's Exaone4ForCausalLM).

References:
    LG AI Research, "EXAONE 4.0" (arXiv 2507.11407).
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models.common import configuration
from jaxprune.models.common.configuration import SLIDING
from jaxprune.models.common.decoder import Embed, Head, inputs
from jaxprune.models.olmo2 import DecoderLayer

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(configuration.LayerEntries, hf)
        every, whole = configuration.rope_of(read), read.sliding_window is None
        return cls.of(
            read,
            dtype,
            rope=lambda kind: every if whole or kind == SLIDING else None,
            qk_norm="head",
        )
