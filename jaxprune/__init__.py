"""One-shot pruning of LLaMA-family language models in JAX."""

from jaxprune.errors import InputError
from jaxprune.linears import LinearResult
from jaxprune.patterns import NM, Unstructured
from jaxprune.pipeline import LayerResult, other_params, prune

__all__ = ["NM", "InputError", "LayerResult", "LinearResult", "Unstructured", "other_params", "prune"]
