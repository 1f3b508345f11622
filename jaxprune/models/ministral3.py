"""Ministral 3: Mistral for contexts that its rotation stretches to (Hugging Face's
Ministral3ForCausalLM).

Beyond the context that it was first trained on, transformers scales queries by their position; up
to there the factor is 1, and longer windows are not taken.

References:
    Mistral AI, "Ministral 3", 2025, as released.
"""

import dataclasses
from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models import mistral
from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Config(mistral.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        config = super().from_hf(hf, dtype)
        rope = config.kinds[0].rope
        assert rope is not None and config.max_positions is not None
        first = dict(rope.parameters).get("original_max_position_embeddings", config.max_positions)
        return dataclasses.replace(config, max_positions=min(first, config.max_positions))
