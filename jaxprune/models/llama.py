"""LLaMA 1, 2, 3 and the many models of their architecture (Hugging Face's LlamaForCausalLM): all is
`decoder`'s.

References:
    Touvron et al., arXiv 2302.13971 and 2307.09288.
"""

from jaxprune.models.common.configuration import Config
from jaxprune.models.common.decoder import DecoderLayer, Embed, Head, inputs

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]
