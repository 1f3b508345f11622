"""What compilation brings: the first layer pruned with and without it, on the run's own weights and
text."""

import dataclasses
import time

import jax
import numpy as np
from jaxtyping import Int

from convert.schema import Measured
from jaxprune.loop import prune_layers
from jaxprune.phases import require_recipe
from jaxprune.recipe import Recipe
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.rules import with_rules
from jaxprune.streaming.model import StreamedModel


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds by phase of the first layer; `read` is left out.

    Attributes:
        first: compiled, compilation or loading from the cache included.
        jit: compiled.
        eager: under jax.disable_jit, every operation dispatched by itself and every loop in Python.
        equal: share of mask entries that are the same compiled and eager.
    """

    first: dict[str, float]
    jit: dict[str, float]
    eager: dict[str, float]
    equal: Measured


def jit_versus_eager(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], recipe: Recipe
) -> Timing:
    """Prunes the first layer three times; nothing is kept.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        recipe: its method, pattern and rules are used; gradients and distillation are not.
    """
    target = with_rules(*require_recipe(model.architecture, recipe))

    def once() -> tuple[LayerResult, dict[str, float]]:
        layers = prune_layers(model, tokens, recipe.method, target, asymmetry=recipe.asymmetry)
        start = time.perf_counter()
        layer = next(layers)
        seconds = dict(layer.figures.seconds)
        total = time.perf_counter() - start - seconds.pop("read")
        return layer, seconds | {"all": total}

    (_, first), (compiled, jit) = once(), once()
    with jax.disable_jit():
        by_hand, eager = once()
    equal = [np.mean(_kept(compiled, path) == _kept(by_hand, path)) for path in compiled.kernels]
    return Timing(first, jit, eager, float(np.mean(equal)))


def _kept(layer: LayerResult, path: str) -> np.ndarray:
    return layer.params[f"layers.{layer.index}.{path}.kernel"] != 0
