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

from jaxprune.models.common.configuration import Config, Entries, entries
from jaxprune.models.common.family import Family


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    made = Config.of(read, dtype, window=read.sliding_window)
    rope = made.kinds[0].rope
    assert rope is not None
    longest = read.max_position_embeddings
    first = dict(rope.parameters).get("original_max_position_embeddings", longest)
    return dataclasses.replace(made, max_positions=min(first, longest))


FAMILY = Family(config)
