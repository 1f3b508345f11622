"""A recipe on a whole checkpoint: sensitivities -> sparsities -> the loop over layers -> tuning, in rounds."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Params, Reader
from jaxprune.allocation import allocate
from jaxprune.journal import Journal
from jaxprune.models import model_for
from jaxprune.patterns import Pattern, Unstructured
from jaxprune.pipeline import pattern_for_each, prune
from jaxprune.recipe import Recipe
from jaxprune.results import LayerResult, Results
from jaxprune.sensitivity import Importance, Weights, measure_sensitivity, weights
from jaxprune.stages import PatternOf
from jaxprune.stream import require_tokens
from jaxprune.tuning import tune

Spend = Callable[[str, float], None]


def prune_by_recipe(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    *,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    journal: Journal | None = None,
    spend: Spend = lambda phase, seconds: None,
    pruned: Callable[[LayerResult, int], None] = lambda layer, number: None,
    tuned: Callable[[int, float], None] = lambda epoch, divergence: None,
) -> Iterator[LayerResult]:
    """The layers as they are to be stored, in order; no checkpoint is written.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows, [windows, length] token ids.
        recipe: what to do.
        seed: of the order of windows in the tuning.
        dtype: of the model's computation; see `models.model_for`.
        journal: where all that is finished is kept, and taken from where it is kept already; None: nothing is kept.
        spend: is told the seconds of each phase but those in the layers' results.
        pruned: is told of each layer as soon as it is pruned, and in which round; with tuning this is long before it is
            yielded.
        tuned: see `tuning.tune`.

    Raises:
        InputError, CheckpointError: recipe, checkpoint and tokens do not fit together.
    """
    pattern, model = recipe.patterns(), model_for(reader, dtype)
    pattern_for_each(model, pattern)
    require_tokens(model, tokens)
    last = recipe.tuning.rounds - 1

    def results(stage: str, number: int) -> Results:
        return Results(journal, f"{stage}-{number}", model.config.num_layers)

    def layers(current: Reader, number: int) -> Iterator[LayerResult]:
        whole = pattern
        if number < last:
            assert isinstance(pattern, Pattern)
            whole = pattern.part_way((number + 1) / (last + 1))
        each, weighting = _by_importance(
            current, tokens, recipe.importance, whole, dtype, spend, journal, f"sensitivity-{number}"
        )
        visits = prune(
            current,
            tokens,
            recipe.method,
            each,
            weights=weighting,
            asymmetry=recipe.asymmetry,
            dtype=dtype,
            done=results("pruned", number),
        )
        for layer in visits:
            pruned(layer, number)
            if number < last:
                for phase, seconds in layer.seconds.items():
                    spend(phase, seconds)
            yield layer

    def tuned_layers(visits: Iterator[LayerResult], number: int) -> Iterator[LayerResult]:
        every = list(visits)
        start = time.perf_counter()
        released = (every.pop(0) for _ in range(len(every)))
        tuning, done = recipe.tuning.of_round(number), results("tuned", number)
        tunings = tune(
            reader,
            tokens,
            released,
            tuning,
            seed=seed,
            dtype=dtype,
            report=tuned,
            journal=journal,
            stage=f"tuning-{number}",
        )
        for layer in tunings:
            spend("tune", time.perf_counter() - start)
            done.put(layer)
            yield layer
            start = time.perf_counter()
        if journal:
            journal.drop(*(f"{stage}-{number}" for stage in ("sensitivity", "pruned", "tuning")), f"tuned-{number - 1}")

    def finished(number: int) -> list[LayerResult] | None:
        """The layers of a round that is finished, if all of them are whole."""
        done = results("tuned", number)
        found = [done.get(index) for index in range(model.config.num_layers)] if done.complete else []
        whole = [layer for layer in found if layer]
        if not whole or len(whole) < len(found):
            return None
        for layer in whole:
            pruned(layer, number)
        return whole

    def rounds() -> Iterator[LayerResult]:
        current: Reader = reader
        number, whole = 0, None
        for earlier in reversed(range(last + 1)):
            if whole := finished(earlier):
                current, number = Overlay(reader, whole), earlier + 1
                break
        for early in range(number, last):
            current = Overlay(reader, list(tuned_layers(layers(current, early), early)))
        if number > last:
            yield from whole or ()
        else:
            visits = layers(current, last)
            yield from tuned_layers(visits, last) if recipe.tuning.tune_epochs else visits

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
    journal: Journal | None,
    stage: str,
) -> tuple[Pattern | PatternOf, list[Weights] | None]:
    """The pattern of each linear and the weights of each layer."""
    if not importance.measured:
        return pattern, None
    start = time.perf_counter()
    count = importance.windows_of(len(tokens))
    some = tokens[np.arange(count) * len(tokens) // count]
    sensitivity = measure_sensitivity(reader, some, dtype=dtype, journal=journal, stage=stage)
    if importance.spread:
        assert isinstance(pattern, Unstructured)
        sparsities = allocate(reader, sensitivity, pattern.sparsity, importance.spread, dtype=dtype)

        def own(index: int, path: str) -> Pattern:
            return Unstructured(sparsities[index, path])

        pattern = own
    spend("sensitivity", time.perf_counter() - start)
    weighing = [weights(layer, importance) for layer in sensitivity] if importance.weighs else None
    return pattern, weighing
