"""A recipe on a whole model: sensitivities -> sparsities -> the loop over layers -> distillation ->
quantization."""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Int

from convert.names import expert_path
from jaxprune.calibration.stream import TextStream
from jaxprune.errors import Change, InputError
from jaxprune.methods.quantization import has_grid
from jaxprune.models import Architecture
from jaxprune.pruning import distillation, saved_tuning
from jaxprune.pruning.allocation import allocate, zeros_to_allocate
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.distillation import Text, distill
from jaxprune.pruning.layer import Solver
from jaxprune.pruning.loop import targets_for, visit_layers
from jaxprune.pruning.quantized import quantize_layers
from jaxprune.pruning.results import LayerResult, saved_layers
from jaxprune.pruning.rules import TargetOf, by_rules, count_weights, effective_recipe, with_rules
from jaxprune.pruning.sensitivity import Weights, measure_sensitivity, weights
from jaxprune.pruning.store import (
    CURVE,
    PRUNED,
    QUANTIZED,
    SENSITIVITY,
    TUNED,
    TUNING,
    RunStore,
    Stage,
)
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Importance, Tuning, effective_tuning, late_sparsity
from jaxprune.sparsity.patterns import Pattern, Unstructured, partly
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer

Targets = tuple[Pattern | TargetOf, Mapping[tuple[int, str], Pattern | None]]
"""The target of linear layers, and that of those that rules name."""


def prune_model(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    *,
    stream: TextStream | None = None,
    seed: int = 0,
    teacher: StreamedModel | None = None,
    store: RunStore | None = None,
    observer: Observer = SILENT,
) -> Iterator[LayerResult]:
    """Yields the layers as they are to be stored, in order; no checkpoint is written.

    Args:
        model: the dense model, or what is left of it when experts are dropped.
        tokens: calibration windows, [windows, length] token ids.
        recipe: what to do.
        stream: the text that is tuned on, where the recipe takes tokens of one.
        seed: the seed of the order of calibration windows in the distillation.
        teacher: the model towards which is tuned: with all of its experts; None: the same.
        store: where all that is finished is saved, and taken from where it is saved already; None:
            nothing is saved.
        observer: is told each layer as soon as it is pruned, which with distillation is long before
            it is yielded, and again when it is quantized; each step; and the seconds of each phase
            but those in the layers' results.

    Raises:
        InputError, CheckpointError: recipe, model and tokens do not fit together.
    """
    targets = require_recipe(model.architecture, recipe)
    model.require_tokens(tokens)
    require_stream(recipe, stream)
    recipe = effective_recipe(model.architecture, recipe)
    tuning, text = effective_tuning(recipe.tuning, recipe.pattern), None
    if stream and tuning.tunes:
        model.require_tokens(stream.held_out)
        text = distillation.of_stream(stream, tuning)
    elif tuning.tune_epochs:
        text = distillation.of_windows(tokens, tuning, seed)
    layers = _pruned(model, tokens, recipe, targets, store, observer)
    if text:
        layers = _distilled(
            model, teacher, text, layers, tuning, with_rules(*targets), store, observer
        )
    return _quantized(model, tokens, layers, recipe, store, observer) if recipe.quantize else layers


def require_stream(recipe: Recipe, stream: TextStream | None) -> None:
    """Raises InputError where there is no text that the recipe tunes on tokens of, or one that it
    does not use."""
    if recipe.tuning.tune_tokens and stream is None:
        raise InputError(
            "the recipe tunes on tokens of a text: give it as stream",
            options={"tune_epochs": Change.OTHER},
        )
    if stream is not None and not recipe.tuning.tune_tokens:
        raise InputError(
            "the recipe tunes on no stream of text: leave stream out, or set the tokens to tune on"
        )


def require_recipe(architecture: Architecture, recipe: Recipe) -> Targets:
    """Returns the target of linear layers, and that of those that rules name; errors as for
    `prune_model`."""
    target, named = recipe.target(), by_rules(architecture, recipe.rules)
    targets_for(architecture, with_rules(target, named))
    if recipe.importance.spread:
        assert isinstance(target, Unstructured)
        zeros_to_allocate(count_weights(architecture, named), target.sparsity)
    if recipe.asymmetry and architecture.config.routing:
        raise InputError(
            "asymmetry is not implemented for models with experts",
            options={"asymmetry": Change.OMIT},
        )
    if recipe.experts.route_all and not architecture.config.routing:
        raise InputError(
            "the model has no experts to route tokens to", options={"route_all": Change.OMIT}
        )
    if recipe.quantize and not any(
        has_grid(shape[0]) for shape in architecture.kernel_shapes().values()
    ):
        raise InputError(
            f"{recipe.quantize} has blocks of 32 inputs, and no linear layer comes in whole blocks "
            "of 32",
            options={"quantize": Change.OMIT},
        )
    if recipe.experts.drop_experts and callable(target):
        _require_masks_of_kept(architecture, target)
    return target, named


def _require_masks_of_kept(architecture: Architecture, masks: TargetOf) -> None:
    """Raises InputError for masks of more experts than stay: which of them would be whose is not
    known."""
    for index, layer in enumerate(architecture.layers):
        for path, count in layer.experts.items():
            try:
                masks(index, expert_path(path, count))
            except InputError:
                continue  # as it should be
            raise InputError(
                f"the masks are of more experts than the {count} of layer {index} that stay: drop "
                "experts first, and "
                "give the result as checkpoint",
                options={"drop_experts": Change.OMIT},
            )


def _pruned(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    targets: Targets,
    store: RunStore | None,
    observer: Observer,
) -> Iterator[LayerResult]:
    visited, states, solver = solving(model, tokens, recipe, targets, store, observer)
    for layer in visit_layers(visited, states, solver, saved_layers(store, PRUNED)):
        observer.layer_done(layer)
        yield layer


def solving(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    targets: Targets,
    store: RunStore | None = None,
    observer: Observer = SILENT,
) -> tuple[StreamedModel, CalibrationStates, Solver]:
    """Returns what `visit_layers` takes to prune a model by a recipe, before any tuning.

    Args:
        model, tokens, recipe, store, observer: as for `prune_model`.
        targets: as `require_recipe` returns them.
    """
    target, named = targets
    late = late_sparsity(recipe.tuning, recipe.pattern)
    target, layer_weights = _by_importance(
        model, tokens, recipe.importance, target, late, named, store, observer
    )
    target_of = targets_for(model.architecture, with_rules(target, named))
    solver = Solver(recipe.method, target_of, layer_weights, recipe.asymmetry)
    visited = model.routing_all() if recipe.experts.route_all else model
    return visited, CalibrationStates(visited, tokens, with_dense=recipe.asymmetry > 0), solver


def _distilled(
    model: StreamedModel,
    teacher: StreamedModel | None,
    text: Text,
    layers: Iterator[LayerResult],
    tuning: Tuning,
    target_of: TargetOf,
    store: RunStore | None,
    observer: Observer,
) -> Iterator[LayerResult]:
    saved = saved_layers(store, TUNED)
    if saved.whole(model.num_layers):
        yield from _told(saved, model, observer)
        return
    if store:  # of a tuning that is done again all layers are saved, and its measures
        store.drop(TUNED, CURVE)
    every = list(layers)
    start = time.perf_counter()
    released = (every.pop(0) for _ in range(len(every)))
    tuned = distill(
        model,
        text,
        released,
        tuning,
        target_of=target_of,
        teacher=teacher,
        store=store,
        observer=observer,
    )
    for layer in tuned:
        observer.phase_timed("tune", time.perf_counter() - start)
        observer.layer_tuned(layer)
        saved.put(layer.index, layer)
        yield layer
        start = time.perf_counter()
    if store:
        store.drop(SENSITIVITY, PRUNED, TUNING)


def _quantized(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    layers: Iterator[LayerResult],
    recipe: Recipe,
    store: RunStore | None,
    observer: Observer,
) -> Iterator[LayerResult]:
    assert recipe.quantize
    saved = saved_layers(store, QUANTIZED)
    if saved.whole(model.num_layers):
        yield from _told(saved, model, observer)
        return
    if store:
        for _ in layers:
            pass  # to the end, so that all that those stages hold is let go
        store.wait()
        earlier = saved_layers(store, TUNED if recipe.tuning.tunes else PRUNED)
        pruned: Callable[[int], LayerResult] = earlier.require
    else:
        pruned = {layer.index: layer for layer in layers}.__getitem__
    observer.started("quantizing", model.num_layers)
    routed = model.routing_all() if recipe.experts.route_all else model
    for layer in quantize_layers(routed, tokens, pruned, recipe.quantize, saved):
        observer.layer_done(layer)
        yield layer
    if store:
        store.drop(SENSITIVITY, PRUNED, TUNED)


def _told(
    saved: Stage[LayerResult], model: StreamedModel, observer: Observer
) -> Iterator[LayerResult]:
    """Yields the layers of a stage that an earlier process ended, of which the observer is told."""
    for point in saved_tuning.curve(saved.store):
        observer.divergence_measured(*point)
    for index in range(model.num_layers):
        layer = saved.require(index)
        observer.layer_done(layer)
        yield layer


def _by_importance(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    importance: Importance,
    target: Pattern | TargetOf,
    late: float,
    named: Mapping[tuple[int, str], Pattern | None],
    store: RunStore | None,
    observer: Observer,
) -> tuple[Pattern | TargetOf, list[Weights] | None]:
    """Returns the target of each kernel that no rule names, without the sparsity that comes late,
    and the weights of each layer."""
    if late and not importance.spread:
        assert isinstance(target, Unstructured)
        target = partly(target, late)
    if not importance.measured:
        return target, None
    start = time.perf_counter()
    count = importance.windows_of(len(tokens))
    some = tokens[np.arange(count) * len(tokens) // count]
    sensitivity = measure_sensitivity(model, some, store=store)
    if importance.spread:
        assert isinstance(target, Unstructured)
        patterns = allocate(model, sensitivity, target.sparsity, importance.spread, named, late)

        def own(index: int, path: str) -> Pattern:
            return patterns[index, path]

        target = own
    observer.phase_timed("sensitivity", time.perf_counter() - start)
    layer_weights = (
        [weights(layer, importance) for layer in sensitivity] if importance.weighs else None
    )
    return target, layer_weights
