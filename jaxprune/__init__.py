"""One-shot pruning of LLaMA-family language models in JAX."""

from jaxprune.errors import InputError
from jaxprune.pruning.kernel import LinearResult
from jaxprune.pruning.pipeline import other_params, prune
from jaxprune.pruning.results import LayerResult
from jaxprune.sparsity.patterns import NM, Unstructured

__all__ = ["NM", "InputError", "LayerResult", "LinearResult", "Unstructured", "other_params", "prune"]
