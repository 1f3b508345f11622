"""A recipe on a whole checkpoint: sensitivities -> sparsities -> the loop over layers -> tuning."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Reader
from jaxprune.models import model_for
from jaxprune.pruning.allocation import allocate
from jaxprune.pruning.distillation import tune
from jaxprune.pruning.journal import PRUNED, SENSITIVITY, TUNED, TUNING, Journal
from jaxprune.pruning.pipeline import pattern_for_each, prune
from jaxprune.pruning.results import LayerResult, Results
from jaxprune.pruning.sensitivity import Importance, Weights, measure_sensitivity, weights
from jaxprune.pruning.stages import PatternOf
from jaxprune.recipe import Recipe
from jaxprune.sparsity.patterns import Pattern, Unstructured
from jaxprune.streaming.stream import require_tokens

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
    pruned: Callable[[LayerResult], None] = lambda layer: None,
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
        pruned: is told of each layer as soon as it is pruned; with tuning this is long before it is yielded.
        tuned: see `tuning.tune`.

    Raises:
        InputError, CheckpointError: recipe, checkpoint and tokens do not fit together.
    """
    pattern, model = recipe.patterns(), model_for(reader, dtype)
    pattern_for_each(model, pattern)
    require_tokens(model, tokens)

    def results(stage: str) -> Results:
        return Results(journal, stage, model.config.num_layers)

    def layers() -> Iterator[LayerResult]:
        each, weighting = _by_importance(reader, tokens, recipe.importance, pattern, dtype, spend, journal)
        visits = prune(
            reader,
            tokens,
            recipe.method,
            each,
            weights=weighting,
            asymmetry=recipe.asymmetry,
            dtype=dtype,
            done=results(PRUNED),
        )
        for layer in visits:
            pruned(layer)
            yield layer

    def tuned_layers() -> Iterator[LayerResult]:
        done = results(TUNED)
        if whole := done.whole():
            for layer in whole:
                pruned(layer)
            yield from whole
            return
        every = list(layers())
        start = time.perf_counter()
        released = (every.pop(0) for _ in range(len(every)))
        how = recipe.tuning
        for layer in tune(reader, tokens, released, how, seed=seed, dtype=dtype, report=tuned, journal=journal):
            spend("tune", time.perf_counter() - start)
            done.put(layer)
            yield layer
            start = time.perf_counter()
        if journal:
            journal.drop(SENSITIVITY, PRUNED, TUNING)

    return tuned_layers() if recipe.tuning.tune_epochs else layers()


def _by_importance(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    importance: Importance,
    pattern: Pattern | PatternOf,
    dtype: DTypeLike | None,
    spend: Spend,
    journal: Journal | None,
) -> tuple[Pattern | PatternOf, list[Weights] | None]:
    """The pattern of each linear and the weights of each layer."""
    if not importance.measured:
        return pattern, None
    start = time.perf_counter()
    count = importance.windows_of(len(tokens))
    some = tokens[np.arange(count) * len(tokens) // count]
    sensitivity = measure_sensitivity(reader, some, dtype=dtype, journal=journal)
    if importance.spread:
        assert isinstance(pattern, Unstructured)
        sparsities = allocate(reader, sensitivity, pattern.sparsity, importance.spread, dtype=dtype)

        def own(index: int, path: str) -> Pattern:
            return Unstructured(sparsities[index, path])

        pattern = own
    spend("sensitivity", time.perf_counter() - start)
    weighing = [weights(layer, importance) for layer in sensitivity] if importance.weighs else None
    return pattern, weighing
