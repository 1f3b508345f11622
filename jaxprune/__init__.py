"""One-shot pruning of LLaMA-family language models in JAX."""

from jaxprune.errors import InputError
from jaxprune.linears import LinearResult
from jaxprune.patterns import NM, Unstructured
from jaxprune.pipeline import other_params, prune
from jaxprune.results import LayerResult

__all__ = ["NM", "InputError", "LayerResult", "LinearResult", "Unstructured", "other_params", "prune"]
