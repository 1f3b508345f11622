"""SmolLM 3: LLaMA whose every fourth layer has no rotation (Hugging Face's SmolLM3ForCausalLM).

References:
    Bakouch et al., "SmolLM3", 2025, as released; layers without rotation: Yang et al. (arXiv
    2501.18795).
"""

import dataclasses
from typing import Any

from jaxtyping import DTypeLike

from jaxprune.errors import InputError
from jaxprune.models.common import configuration
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.LayerEntries):
    """The entries of config.json that the family reads."""

    no_rope_layers: list[int]
    use_sliding_window: bool


class Config(configuration.Config):
    """See `configuration.Config`."""

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        if len(read.no_rope_layers) < read.num_hidden_layers:
            raise InputError(
                f"no_rope_layers has {len(read.no_rope_layers)} entries for "
                f"{read.num_hidden_layers} layers"
            )
        config = cls.of(read, dtype)
        kinds = (
            configuration.Kind(
                kind.rope if rotated else None, kind.window if read.use_sliding_window else None
            )
            for kind, rotated in zip(config.kinds, read.no_rope_layers, strict=False)
        )
        return dataclasses.replace(config, kinds=tuple(kinds))
