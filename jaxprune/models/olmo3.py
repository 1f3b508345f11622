"""OLMo 3: OLMo 2 with windows in three layers of four, and a rotation of their own for these
(Hugging Face's Olmo3ForCausalLM).

References:
    Team OLMo, "Olmo 3" (arXiv 2512.13961).
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import Embed, Head, inputs
from jaxprune.models.olmo2 import DecoderLayer

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(configuration.LayerEntries, hf)
        return cls.of(read, dtype, rope=configuration.rope_by_type(read), qk_norm="all")
