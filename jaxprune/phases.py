"""Applies a recipe to a model: sensitivity, sparsities, pruning, distillation, quantization."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from convert.names import expert_path
from jaxprune.calibration.text_stream import TextStream
from jaxprune.costs.program import PhaseCosts
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.distill import distillation, saved_tuning, tuning_costs
from jaxprune.distill.distillation import Text, distill
from jaxprune.errors import Change, InputError
from jaxprune.evaluation import perplexity
from jaxprune.loop import sweep_layers
from jaxprune.methods.quantization import has_grid
from jaxprune.models import Architecture
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import effective_tuning, gradual_sparsity
from jaxprune.run_store.context import NO_STORE, Context
from jaxprune.run_store.store import CURVE, PRUNED, QUANTIZED, SENSITIVITY, TUNED, TUNING
from jaxprune.solve import layer_costs, sensitivity
from jaxprune.solve.allocation import allocate, zeros_to_allocate
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.layer import Solver, unsolved_layer
from jaxprune.solve.layer_result import LayerResult, SavedLayers, saved_layers
from jaxprune.solve.quantized_layers import quantize_layers
from jaxprune.solve.rules import (
    TargetOf,
    by_rules,
    count_weights,
    effective_recipe,
    targets_for,
    with_rules,
)
from jaxprune.solve.sensitivity import Weights, evenly_spaced, measure_sensitivity, weights
from jaxprune.sparsity.patterns import Pattern, Unstructured, partly
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import sweep
from jaxprune.structure import experts, layers, removal_costs

Targets = tuple[Pattern | TargetOf, Mapping[tuple[int, str], Pattern | None]]
"""The target of linear layers that no rule names, and the patterns of those that rules name."""


def prune_model(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    recipe: Recipe,
    *,
    stream: TextStream | None = None,
    seed: int = 0,
    context: Context = NO_STORE,
) -> Iterator[LayerResult]:
    """Yields the final layers in order; writes no checkpoint.

    Args:
        model: the dense model, after any removal of its parts.
        tokens: calibration windows, [windows, length] token ids.
        recipe: how to prune.
        stream: the text to tune on, if the recipe tunes on a stream.
        seed: seed for the order of calibration windows in the distillation.
        context: its store saves finished work. Its observer is notified of each pruned layer, each
            tuning step and each quantized layer. It also gets the seconds of phases that layers'
            results do not include. With distillation, a layer is pruned long before it is yielded.

    Raises:
        InputError, CheckpointError: recipe, model and tokens do not fit together.
    """
    phases = Phases.of(model, tokens, recipe, context)
    require_stream(recipe, stream)
    tuning, text = effective_tuning(phases.recipe.tuning, recipe.pattern), None
    if stream and tuning.tunes:
        model.require_tokens(stream.held_out)
        text = distillation.of_stream(stream, tuning)
    elif tuning.tune_epochs:
        text = distillation.of_windows(tokens, tuning, seed)
    phases = dataclasses.replace(phases, text=text)
    layers: Iterator[LayerResult] = iter(())
    for phase in PHASES:
        if phase.layers and phase.wanted(phases.recipe):
            layers = phase.layers(phases, layers)
    return layers


def require_stream(recipe: Recipe, stream: TextStream | None) -> None:
    """Checks that a stream is given if and only if the recipe tunes on one.

    Raises:
        InputError: the stream is missing, or the recipe does not use it.
    """
    if recipe.tuning.tune_tokens and stream is None:
        raise InputError(
            "the recipe tunes on a stream of text: pass stream",
            options={"tune_epochs": Change.OTHER},
        )
    if stream is not None and not recipe.tuning.tune_tokens:
        raise InputError(
            "the recipe tunes on no stream of text: omit stream, or set the tokens to tune on"
        )


def require_recipe(architecture: Architecture, recipe: Recipe) -> Targets:
    """Returns the targets of a recipe on a model; raises as `prune_model`."""
    target, named = recipe.target(), by_rules(architecture, recipe.rules)
    targets_for(architecture, with_rules(target, named))
    if recipe.importance.max_deviation:
        assert isinstance(target, Unstructured)
        zeros_to_allocate(count_weights(architecture, named), target.sparsity)
    if recipe.asymmetry and architecture.config.routing:
        raise InputError(
            "asymmetry is not implemented for models with experts",
            options={"asymmetry": Change.OMIT},
        )
    if recipe.route_all and not architecture.config.routing:
        raise InputError(
            "the model has no experts to route tokens to", options={"route_all": Change.OMIT}
        )
    if recipe.quantize and not any(
        has_grid(shape[0]) for shape in architecture.kernel_shapes().values()
    ):
        raise InputError(
            f"{recipe.quantize} has blocks of 32 inputs, but no linear layer's inputs form whole "
            "blocks",
            options={"quantize": Change.OMIT},
        )
    if recipe.structure.drop_experts and callable(target):
        _require_masks_of_kept(architecture, target)
    return target, named


def _require_masks_of_kept(architecture: Architecture, masks: TargetOf) -> None:
    """Checks that masks cover only the experts that remain.

    Masks of more experts would be ambiguous: which experts remain is not known yet.

    Raises:
        InputError: masks cover more experts.
    """
    for index, layer in enumerate(architecture.layers):
        for path, count in layer.experts.items():
            try:
                masks(index, expert_path(path, count))
            except InputError:
                continue  # there is no mask of a further expert
            raise InputError(
                f"the masks cover more experts than the {count} of layer {index} that remain: "
                "remove experts first, and pass the result as checkpoint",
                options={"drop_experts": Change.OMIT},
            )


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of a recipe on a model.

    Attributes:
        model, tokens, context: as for `prune_model`.
        recipe: without what changes nothing, since rules name every linear layer.
        targets: as `require_recipe` returns them.
        text: what is tuned on; None: nothing is tuned.
    """

    model: StreamedModel
    tokens: Int[np.ndarray, "w t"]
    recipe: Recipe
    targets: Targets
    context: Context
    text: Text | None = None

    @classmethod
    def of(
        cls, model: StreamedModel, tokens: Int[np.ndarray, "w t"], recipe: Recipe, context: Context
    ) -> "Phases":
        """Returns the phases; arguments and errors as for `prune_model`."""
        targets = require_recipe(model.architecture, recipe)
        model.require_tokens(tokens)
        return cls(model, tokens, effective_recipe(model.architecture, recipe), targets, context)

    def solving(self, saved: SavedLayers | None = None) -> tuple[CalibrationStates, Solver]:
        """Returns the arguments of `sweep_layers` that prune the model, without tuning.

        Args:
            saved: where pruned layers are saved.
        """
        target, layer_weights = self._by_importance()
        target_of = targets_for(self.model.architecture, with_rules(target, self.targets[1]))
        asymmetry = self.recipe.asymmetry
        states = CalibrationStates(self._routed, self.tokens, with_dense=asymmetry > 0, saved=saved)
        return states, Solver(self.recipe.method, target_of, layer_weights, asymmetry)

    @property
    def _routed(self) -> StreamedModel:
        return self.model.routing_all() if self.recipe.route_all else self.model

    def pruned(self, _: Iterator[LayerResult]) -> Iterator[LayerResult]:
        """Yields pruned layers; there are none before."""
        for layer in sweep_layers(*self.solving(saved_layers(self.context.store, PRUNED))):
            self.context.observer.layer_done(layer)
            yield layer

    def without_zeros(self, _: Iterator[LayerResult]) -> Iterator[LayerResult]:
        """Yields layers as they are; there are none before."""
        model, saved = self.model, saved_layers(self.context.store, PRUNED)
        visit = partial(unsolved_layer, model, with_rules(*self.targets))
        for layer in sweep(range(model.num_layers), model.layers, visit, saved=saved):
            self.context.observer.layer_done(layer)
            yield layer

    def tuned(self, layers: Iterator[LayerResult]) -> Iterator[LayerResult]:
        """Yields pruned layers tuned on the text."""
        context, saved = self.context, saved_layers(self.context.store, TUNED)
        if saved and saved.complete(self.model.num_layers):
            yield from self._replay(saved)
            return
        # The tuning is repeated: the saved curve and layers are from an earlier one.
        context.drop(TUNED, CURVE)
        every = list(layers)
        released = (every.pop(0) for _ in range(len(every)))
        target_of, tuning, text = with_rules(*self.targets), self.recipe.tuning, self.text
        assert text
        tuned = distill(self.model, text, released, tuning, target_of=target_of, context=context)
        for _ in range(self.model.num_layers):
            with context.timed("tune"):
                layer = next(tuned)
            context.observer.layer_tuned(layer)
            if saved:
                saved.put(layer.index, layer)
            yield layer
        context.drop(SENSITIVITY, PRUNED, TUNING)

    def quantized(self, layers: Iterator[LayerResult]) -> Iterator[LayerResult]:
        """Yields pruned or tuned layers after quantization."""
        context, saved = self.context, saved_layers(self.context.store, QUANTIZED)
        if saved and saved.complete(self.model.num_layers):
            yield from self._replay(saved)
            return
        earlier = saved_layers(context.store, TUNED if self.recipe.tuning.tunes else PRUNED)
        if context.store and earlier:
            for _ in layers:
                pass  # runs earlier stages to the end, which frees their memory
            context.store.wait()
            pruned: Callable[[int], LayerResult] = earlier.require
        else:
            pruned = {layer.index: layer for layer in layers}.__getitem__
        context.observer.started("quantizing", self.model.num_layers)
        states = CalibrationStates(self._routed, self.tokens, with_dense=False, saved=saved)
        assert self.recipe.quantize
        for layer in quantize_layers(states, pruned, self.recipe.quantize):
            context.observer.layer_done(layer)
            yield layer
        context.drop(SENSITIVITY, PRUNED, TUNED)

    def _replay(self, saved: SavedLayers) -> Iterator[LayerResult]:
        """Yields the saved layers of a finished stage, and notifies the observer of each."""
        observer = self.context.observer
        for point in saved_tuning.curve(saved.store):
            observer.divergence_measured(*point)
        for index in range(self.model.num_layers):
            layer = saved.require(index)
            observer.layer_done(layer)
            yield layer

    def _by_importance(self) -> tuple[Pattern | TargetOf, list[Weights] | None]:
        """Returns the target of each kernel that no rule names, and the weights of each layer.

        Targets exclude the sparsity that gradual pruning adds.
        """
        target, named = self.targets
        importance, gradual = (
            self.recipe.importance,
            gradual_sparsity(self.recipe.tuning, self.recipe.pattern),
        )
        if gradual and not importance.max_deviation:
            assert isinstance(target, Unstructured)
            target = partly(target, gradual)
        if not importance.measured:
            return target, None
        with self.context.timed("sensitivity"):
            some = evenly_spaced(self.tokens, importance.windows_of(len(self.tokens)))
            found = measure_sensitivity(self.model, some, store=self.context.store)
            if importance.max_deviation:
                assert isinstance(target, Unstructured)
                patterns = allocate(
                    self.model, found, target.sparsity, importance.max_deviation, named, gradual
                )

                def own(index: int, path: str) -> Pattern:
                    return patterns[index, path]

                target = own
        of_layers = [weights(layer, importance) for layer in found] if importance.weighs else None
        return target, of_layers


class Phase(NamedTuple):
    """A phase of a run.

    Attributes:
        wanted: recipe -> whether a run of it has the phase.
        costs: the sizes of a run -> what the phase costs.
        layers: the layers of the phase before -> its own; None: it makes no layers.
    """

    wanted: Callable[[Recipe], bool]
    costs: Callable[[RunSizes], PhaseCosts]
    layers: Callable[[Phases, Iterator[LayerResult]], Iterator[LayerResult]] | None = None


PHASES = (
    Phase(lambda recipe: recipe.structure.drop_parameters > 0, removal_costs.mix_costs),
    Phase(lambda recipe: recipe.structure.chooses_layers, layers.costs),
    Phase(lambda recipe: recipe.structure.drop_experts > 0, experts.costs),
    Phase(lambda recipe: recipe.structure.drop_heads > 0, partial(removal_costs.costs, "heads")),
    Phase(
        lambda recipe: recipe.structure.drop_channels + recipe.structure.drop_parameters > 0,
        partial(removal_costs.costs, "channels"),
    ),
    Phase(lambda recipe: recipe.importance.measured, sensitivity.costs),
    Phase(lambda recipe: recipe.prunes, layer_costs.pruning, Phases.pruned),
    Phase(lambda recipe: not recipe.prunes, layer_costs.without_zeros, Phases.without_zeros),
    Phase(lambda recipe: recipe.tuning.tunes, tuning_costs.costs, Phases.tuned),
    Phase(lambda recipe: recipe.quantize is not None, layer_costs.quantization, Phases.quantized),
    Phase(lambda recipe: True, perplexity.costs),
)
"""The phases of a run, in order: `prune_model` runs those that make layers, and a plan adds up what
all of them cost."""
