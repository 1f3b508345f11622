"""Gemma 3's text model: Gemma 2 with normalized queries and keys, five layers of six with a window,
and a rotation of their own for these (Hugging Face's Gemma3ForCausalLM).

References:
    Gemma Team, "Gemma 3 Technical Report" (arXiv 2503.19786).
"""

from typing import Any

from jaxtyping import DTypeLike

from jaxprune.models import gemma2
from jaxprune.models.common.configuration import Config, Rotation, entries
from jaxprune.models.common.family import Family


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(gemma2.Entries, hf)
    rope = Rotation(by_type=True)
    return Config.of(read, dtype, rope=rope, qk_norm="head", **gemma2.options(read))


FAMILY = Family(config)
