"""SmolLM 3: LLaMA whose every fourth layer has no rotation (Hugging Face's SmolLM3ForCausalLM).

References:
    Bakouch et al., "SmolLM3", 2025, as released; layers without rotation: Yang et al. (arXiv
    2501.18795).
"""

import dataclasses
from typing import Any

from jaxtyping import DTypeLike

from jaxprune.errors import InputError
from jaxprune.models.common.configuration import Config, Kind, LayerEntries, entries
from jaxprune.models.common.family import Family


class Entries(LayerEntries):
    """The entries of config.json that the family reads."""

    no_rope_layers: list[int]
    use_sliding_window: bool


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    if len(read.no_rope_layers) < read.num_hidden_layers:
        raise InputError(
            f"no_rope_layers has {len(read.no_rope_layers)} entries for "
            f"{read.num_hidden_layers} layers"
        )
    made = Config.of(read, dtype)
    kinds = (
        Kind(kind.rope if rotated else None, kind.window if read.use_sliding_window else None)
        for kind, rotated in zip(made.kinds, read.no_rope_layers, strict=False)
    )
    return dataclasses.replace(made, kinds=tuple(kinds))


FAMILY = Family(config)
