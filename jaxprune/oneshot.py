"""A recipe on a whole checkpoint: sensitivities -> sparsities -> the loop over layers -> tuning, in rounds."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Params, Reader
from jaxprune.allocation import allocate
from jaxprune.models import model_for
from jaxprune.patterns import Pattern, Unstructured
from jaxprune.pipeline import LayerResult, PatternOf, pattern_for_each, prune
from jaxprune.recipe import Recipe
from jaxprune.sensitivity import Importance, Weights, measure_sensitivity, weights
from jaxprune.stream import require_tokens
from jaxprune.tuning import Tuning, tune

Spend = Callable[[str, float], None]


def prune_by_recipe(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    *,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    spend: Spend = lambda phase, seconds: None,
    pruned: Callable[[LayerResult, bool], None] = lambda layer, final: None,
    tuned: Callable[[int, float], None] = lambda epoch, divergence: None,
) -> Iterator[LayerResult]:
    """The layers as they are to be stored, in order; nothing is written.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows, [windows, length] token ids.
        recipe: what to do.
        seed: of the order of windows in the tuning.
        dtype: of the model's computation; see `models.model_for`.
        spend: is told the seconds of each phase but those in the layers' results.
        pruned: is told of each layer as soon as it is pruned, and whether that is the last round; with tuning this is
            long before it is yielded.
        tuned: see `tuning.tune`.

    Raises:
        InputError, CheckpointError: recipe, checkpoint and tokens do not fit together.
    """
    pattern, model = recipe.patterns(), model_for(reader, dtype)
    pattern_for_each(model, pattern)
    require_tokens(model, tokens)

    def layers(current: Reader, pattern: Pattern | PatternOf, final: bool) -> Iterator[LayerResult]:
        each, weighting = _by_importance(current, tokens, recipe.importance, pattern, dtype, spend)
        visits = prune(current, tokens, recipe.method, each, weights=weighting, asymmetry=recipe.asymmetry, dtype=dtype)
        for layer in visits:
            pruned(layer, final)
            if not final:
                for phase, seconds in layer.seconds.items():
                    spend(phase, seconds)
            yield layer

    def tuned_layers(visits: Iterator[LayerResult], tuning: Tuning) -> Iterator[LayerResult]:
        every = list(visits)
        start = time.perf_counter()
        released = (every.pop(0) for _ in range(len(every)))
        for layer in tune(reader, tokens, released, tuning, seed=seed, dtype=dtype, report=tuned):
            spend("tune", time.perf_counter() - start)
            yield layer
            start = time.perf_counter()

    def rounds() -> Iterator[LayerResult]:
        current, count = reader, recipe.tuning.rounds
        for index in range(count - 1):
            assert isinstance(pattern, Pattern)
            milder = pattern.part_way((index + 1) / count)
            visits = layers(current, milder, final=False)
            current = Overlay(reader, list(tuned_layers(visits, recipe.tuning.of_round(index))))
        visits = layers(current, pattern, final=True)
        tuning = recipe.tuning.of_round(count - 1)
        yield from tuned_layers(visits, tuning) if tuning.tune_epochs else visits

    return rounds()


class Overlay:
    """A checkpoint whose layers are those in memory: what a round leaves to the next.

    Args:
        reader: of all other params.
        layers: all layers.
    """

    def __init__(self, reader: Reader, layers: Iterable[LayerResult]) -> None:
        self.spec, self.assets = reader.spec, reader.assets
        self._reader = reader
        self._params = {path: array for layer in layers for path, array in layer.params.items()}

    def read(self, paths: Iterable[str]) -> Params:
        """The named parameters, as a reader gives them."""
        wanted = list(paths)
        below = self._reader.read([path for path in wanted if path not in self._params])
        return {path: self._params[path] if path in self._params else below[path] for path in wanted}


def _by_importance(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    importance: Importance,
    pattern: Pattern | PatternOf,
    dtype: DTypeLike | None,
    spend: Spend,
) -> tuple[Pattern | PatternOf, list[Weights] | None]:
    """The pattern of each linear and the weights of each layer."""
    if not importance.measured:
        return pattern, None
    start = time.perf_counter()
    count = min(importance.sensitivity_windows or len(tokens), len(tokens))
    some = tokens[np.arange(count) * len(tokens) // count]
    sensitivity = measure_sensitivity(reader, some, dtype=dtype)
    if importance.spread:
        assert isinstance(pattern, Unstructured)
        sparsities = allocate(reader, sensitivity, pattern.sparsity, importance.spread, dtype=dtype)

        def own(index: int, path: str) -> Pattern:
            return Unstructured(sparsities[index, path])

        pattern = own
    spend("sensitivity", time.perf_counter() - start)
    weighing = [weights(layer, importance) for layer in sensitivity] if importance.weighs else None
    return pattern, weighing
