"""What compilation brings: the first layer pruned with and without it, on the run's own weights and text."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Reader
from jaxprune.pruning.pipeline import prune
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.stages import PatternOf
from jaxprune.recipe import Recipe
from jaxprune.sparsity.patterns import Pattern


class Timing(NamedTuple):
    """Seconds by stage of the first layer; `read` is left out.

    Attributes:
        first: compiled, compilation or loading from the cache included.
        jit: compiled.
        eager: under jax.disable_jit, every operation dispatched by itself and every loop in Python.
        equal: share of mask entries that are the same compiled and eager.
    """

    first: dict[str, float]
    jit: dict[str, float]
    eager: dict[str, float]
    equal: float


def jit_versus_eager(
    reader: Reader, tokens: Int[np.ndarray, "w t"], recipe: Recipe, *, dtype: DTypeLike | None = None
) -> Timing:
    """Prunes the first layer three times; nothing is kept.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows.
        recipe: its method and pattern are used; gradients and tuning are not.
        dtype: of the model's computation; see `models.model_for`.
    """
    pattern: Pattern | PatternOf = recipe.patterns()

    def once() -> tuple[LayerResult, dict[str, float]]:
        layers = prune(reader, tokens, recipe.method, pattern, asymmetry=recipe.asymmetry, dtype=dtype)
        start = time.perf_counter()
        layer = next(layers)
        seconds = {stage: spent for stage, spent in layer.seconds.items() if stage != "read"}
        return layer, seconds | {"all": time.perf_counter() - start - layer.seconds["read"]}

    (_, first), (compiled, jit) = once(), once()
    with jax.disable_jit():
        by_hand, eager = once()
    equal = [np.mean(_kept(compiled, path) == _kept(by_hand, path)) for path in compiled.linears]
    return Timing(first, jit, eager, float(np.mean(equal)))


def _kept(layer: LayerResult, path: str) -> np.ndarray:
    return layer.params[f"layers.{layer.index}.{path}.kernel"] != 0


def table(timing: Timing) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a stage each."""
    header = ["first layer", "compiled, first time, s", "compiled, s", "eager, s", "eager / compiled"]
    rows = []
    for stage, jit in timing.jit.items():
        first, eager = timing.first[stage], timing.eager[stage]
        rows.append([stage, f"{first:.2f}", f"{jit:.2f}", f"{eager:.2f}", f"{eager / max(jit, 1e-9):.2f}"])
    return header, rows
