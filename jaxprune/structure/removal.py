"""Removes parts of a model, layer after layer, and re-optimizes what reads them.

Each layer's remaining units are chosen, and the linear layers that read them re-optimized, on the
inputs that the layers before it produce after their own removal. A reverse pass of the model before
the removal says how much the loss depends on each unit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Base64UrlBytes

from convert import Params, Reader
from convert.checkpoint import DerivedReader
from convert.errors import DamagedError
from convert.schema import Count, FiniteOrNull, Measured
from jaxprune.costs.run_sizes import Removal
from jaxprune.methods.magnitude import Magnitude
from jaxprune.models import Layer
from jaxprune.recipe_parts import Structure
from jaxprune.run_store.context import NO_STORE, Context
from jaxprune.run_store.store import CHANNELS, HEADS, SENSITIVITY, Saved, Stage, flat, grouped
from jaxprune.sharding import fetch
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.layer import Inputs, Solver, layer_inputs
from jaxprune.solve.sensitivity import evenly_spaced, measure_sensitivity
from jaxprune.sparsity.patterns import Unstructured
from jaxprune.streaming.model import StreamedModel, in_checkpoint, inside_layer
from jaxprune.streaming.sweep import Results, sweep, timed
from jaxprune.structure.experts import kept_experts
from jaxprune.structure.input_groups import remove_inputs
from jaxprune.structure.layers import dropped_layers, without_layers
from jaxprune.structure.mix import Mix, chosen_mix
from jaxprune.structure.predictors import without_predictors
from jaxprune.structure.shapes import Units, cut, measured_units, units_of
from jaxprune.structure.sizes import removal_of

STAGE_OF = {"heads": HEADS, "channels": CHANNELS}
WINDOWS = 16
"""The number of calibration windows that gradients are computed on."""


@dataclasses.dataclass(frozen=True)
class SmallerLayer:
    """What remains of the units of a layer.

    Attributes:
        kept: capture -> the indices of its units that stay, sorted.
        kernels: linear layer that reads them -> its re-optimized kernel, in its stored dtype.
        errors: the same -> its relative error on the calibration tokens.
    """

    kept: dict[str, Int[np.ndarray, "k"]]
    kernels: Params
    errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class RemovedUnits:
    """What a removal took from every layer, for the record.

    Attributes:
        kept: layer index -> input of linear layers -> bits of its units, 1 for those that stay.
        errors: layer index -> linear layer that reads them -> its relative error.
    """

    kept: dict[str, dict[str, Base64UrlBytes]]
    errors: dict[str, dict[str, Measured]]


@dataclasses.dataclass(frozen=True)
class Removed:
    """What a run removed, for the record.

    Attributes:
        predictors: the modules for multi-token prediction that were removed, such as `mtp`.
        layers: the indices of the layers that were removed, in the order in which they were chosen.
        divergences: the KL divergence from the dense model after each of them; empty if they were
            named.
        experts: layer index -> the experts that stayed, where some were removed. Layers are counted
            without those that were removed, here and in `units`.
        units: heads or channels -> which of them were removed.
        mix: how many of each kind, where the run chose that; None: the recipe says it.
    """

    predictors: list[str] = dataclasses.field(default_factory=list)
    layers: list[Count] = dataclasses.field(default_factory=list)
    divergences: list[FiniteOrNull] = dataclasses.field(default_factory=list)
    experts: dict[str, list[Count]] = dataclasses.field(default_factory=dict)
    units: dict[str, RemovedUnits] = dataclasses.field(default_factory=dict)
    mix: Mix | None = None


class SmallerReader(DerivedReader):
    """Reads a checkpoint without the units that a removal took from its layers.

    Args:
        reader: reads the whole checkpoint.
        removal: the removal.
        layer_of: layer index -> what remains of its units.
    """

    def __init__(
        self, reader: Reader, removal: Removal, layer_of: Callable[[int], SmallerLayer]
    ) -> None:
        after = removal.after.spec
        spec = {
            path: jax.ShapeDtypeStruct(
                after[path].shape if path in after else tensor.shape, tensor.dtype
            )
            for path, tensor in reader.spec.items()
        }
        super().__init__(reader, spec, removal.changes)
        self._removal, self._layer_of = removal, layer_of

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory; errors as the reader's."""
        whole, found = self._reader.read(paths), dict[str, Any]()
        by_layer: dict[int | None, Params] = {}
        for path, array in whole.items():
            before, _, rest = path.partition(".")
            index = int(rest.partition(".")[0]) if before == "layers" else None
            by_layer.setdefault(index, {})[path] = array
        for index, params in by_layer.items():
            if index is not None:
                inside = inside_layer(index, params)
                left = cut_layer(self._removal, index, self._layer_of(index), inside)
                params = in_checkpoint(index, left)
            found |= params
        return {path: found[path] for path in whole}


def cut_layer(removal: Removal, index: int, left: SmallerLayer, params: Params) -> Params:
    """Returns params of a layer as they are after a removal.

    Args:
        removal: the removal.
        index: the index of the layer.
        left: what remains of its units.
        params: path in the layer, as in a checkpoint -> array before the removal.
    """
    layers = removal.before.layers[index], removal.after.layers[index]
    units = units_of(*layers, removal.groups)
    kernels = {f"{path}.kernel": kernel for path, kernel in left.kernels.items()}
    found = cut(*layers, units, left.kept, params)
    return found | {path: kernels[path] for path in kernels.keys() & params.keys()}


class InMemory(Results[SmallerLayer]):
    """Keeps the results of a sweep in memory."""

    def __init__(self) -> None:
        self._layers: dict[int, SmallerLayer] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._layers

    def put(self, index: int, result: SmallerLayer) -> None:
        self._layers[index] = result

    def get(self, index: int) -> SmallerLayer | None:
        return self._layers.get(index)

    def require(self, index: int) -> SmallerLayer:
        """Returns a result that is there."""
        return self._layers[index]


def remove(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    structure: Structure,
    context: Context = NO_STORE,
) -> tuple[StreamedModel, Removed]:
    """Removes the parts of a model that a recipe names.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        structure: what is removed.
        context: its store saves finished layers, its observer gets the seconds.

    Returns:
        The smaller model, and what was removed.

    Raises:
        InputError: see `sizes.removals`.
    """
    removed = Removed()
    if structure.resizes:
        model, predictors = without_predictors(model)
        removed = Removed(predictors)
    if structure.drop_parameters:
        with context.timed("mix"):
            mix = chosen_mix(model, tokens, structure, _removing, context)
        structure, removed = mix.structure, dataclasses.replace(removed, mix=mix)
    for kind in structure.removed:
        with context.timed(kind):
            if kind == "layers":
                dropped = dropped_layers(model, tokens, structure, context)
                removed = dataclasses.replace(removed, **dropped._asdict())
                model = without_layers(model, dropped.layers)
            elif kind == "experts":
                kept = kept_experts(model, tokens, structure.drop_experts, context.store)
                experts = {str(index): own for index, own in kept.items()}
                removed = dataclasses.replace(removed, experts=experts)
                model = model.keeping(kept)
            else:
                removal = removal_from(model, kind, structure)
                model, units = remove_units(model, tokens, removal, context)
                removed = dataclasses.replace(removed, units=removed.units | {kind: units})
    return model, removed


def _removing(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], structure: Structure
) -> StreamedModel:
    return remove(model, tokens, structure)[0]


def removal_from(model: StreamedModel, kind: str, structure: Structure) -> Removal:
    """Returns the removal of one kind of parts from a model; errors as for `sizes.removals`."""
    assets, entries = model.reader.assets, model.changed_entries
    return removal_of(model.architecture, assets, kind, structure, entries)


def remove_units(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    removal: Removal,
    context: Context = NO_STORE,
) -> tuple[StreamedModel, RemovedUnits]:
    """Removes heads or channels from every layer.

    Args:
        model: the model before the removal.
        tokens: calibration windows, [windows, length] token ids.
        removal: the removal.
        context: its store saves finished layers; without one, they stay in memory.

    Returns:
        The smaller model, and what was removed.
    """
    store = context.store
    changes = _changes(model, tokens, removal, context)
    stage = Stage(store, STAGE_OF[removal.kind], _save, _load) if store else None
    saved: Any = stage or InMemory()
    smaller = model.derived(SmallerReader(model.reader, removal, saved.require))
    states = CalibrationStates(model, tokens, with_dense=False, saved=stage, moves=smaller)
    visit = partial(_remove_from_layer, states, smaller, removal, changes)
    kept, errors = {}, {}
    context.observer.started(f"removing {removal.kind}", model.num_layers)
    order = range(model.num_layers)
    for index, layer in enumerate(sweep(order, model.layers, visit, saved=saved, states=states)):
        units = _units(removal, index)
        kept[str(index)] = {
            capture: _bits(own, units[capture].count) for capture, own in layer.kept.items()
        }
        errors[str(index)] = layer.errors
        context.observer.layer_visited(index)
    return smaller, RemovedUnits(kept, errors)


def without(
    model: StreamedModel, structure: Structure, removed: Removed, file: str | Path
) -> StreamedModel:
    """Returns a dense model without the parts that a run removed, nothing re-optimized.

    Args:
        model: the dense model.
        structure: what the run's recipe removes.
        removed: what the run's record says of it.
        file: the record.

    Raises:
        DamagedError: the record does not say what was removed.
    """
    if structure.resizes:
        model, _ = without_predictors(model)
    if structure.drop_parameters:
        if removed.mix is None:
            raise _unsaid("which mix of parts was removed", file)
        structure = removed.mix.structure
    for kind in structure.removed:
        if kind == "layers":
            named = {*removed.layers} <= {*range(model.num_layers)}
            if not named or len({*removed.layers}) != structure.layer_count:
                raise _unsaid("which layers were removed", file)
            model = without_layers(model, removed.layers)
        elif kind == "experts":
            model = model.keeping({int(index): own for index, own in removed.experts.items()})
        else:
            removal = removal_from(model, kind, structure)
            model = _without_units(model, removal, removed.units.get(kind), file)
    return model


def _without_units(
    model: StreamedModel, removal: Removal, removed: RemovedUnits | None, file: str | Path
) -> StreamedModel:
    layers = {}
    for index in range(model.num_layers):
        units = _units(removal, index)
        said = removed.kept.get(str(index), {}) if removed else {}
        kept = {capture: _places(said.get(capture, b""), one) for capture, one in units.items()}
        if any(len(kept[capture]) != one.keep for capture, one in units.items()):
            raise _unsaid(f"which {removal.kind} of layer {index} were kept", file)
        layers[index] = SmallerLayer(kept, {}, {})
    return model.derived(SmallerReader(model.reader, removal, layers.__getitem__))


def _unsaid(what: str, file: str | Path) -> DamagedError:
    return DamagedError(f"it does not say {what}", file=file, entry="removed")


def _units(removal: Removal, index: int) -> dict[str, Units]:
    return units_of(removal.before.layers[index], removal.after.layers[index], removal.groups)


def _changes(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], removal: Removal, context: Context
) -> list[Mapping[str, Float[np.ndarray, "_"]]]:
    """Returns each layer's captures -> how much the loss changes without each unit; see
    `Sensitivity.units`."""
    order = range(model.num_layers)
    asked = [
        measured_units(model.architecture.layers[index], _units(removal, index)) for index in order
    ]
    name = f"{SENSITIVITY}/{removal.kind}"
    windows = evenly_spaced(tokens, WINDOWS)
    found = measure_sensitivity(model, windows, store=context.store, units=asked, name=name)
    return [layer.units for layer in found]


def _remove_from_layer(
    states: CalibrationStates,
    smaller: StreamedModel,
    removal: Removal,
    changes: Sequence[Mapping[str, Float[np.ndarray, "_"]]],
    index: int,
    stored: Params,
    seconds: dict[str, float],
) -> SmallerLayer:
    """Removes units of a layer and moves the hidden states through what remains of it."""
    model, layer = states.model, states.model.architecture.layers[index]
    params = jax.block_until_ready(model.put_layer(index, stored))
    units, found = _units(removal, index), SmallerLayer({}, {}, {})
    readers = {path for one in units.values() for path in one.readers}
    solver = Solver(Magnitude(), lambda _, path: Unstructured(0.0) if path in readers else None)
    for capture, inputs in layer_inputs(states, solver, index, params, seconds):
        with timed(seconds, "solve"):
            own_changes = jnp.asarray(changes[index][capture])
            _remove_from_input(units[capture], inputs, own_changes, layer, params, found)
    del params
    if index + 1 < model.num_layers:  # the last layer's output is not needed
        with timed(seconds, "forward"):
            own = cut_layer(removal, index, found, layer.unstack(stored))
            after = smaller.architecture.layers[index]
            smaller.forward(index, smaller.put_layer(index, after.stack(own)), states.pruned)
    return found


def _remove_from_input(
    units: Units,
    inputs: Inputs,
    changes: Float[Array, "_"],
    layer: Layer,
    params: Mapping[str, Array],
    found: SmallerLayer,
) -> None:
    """Chooses which units of an input stay, and adds them and the kernels that read them."""
    kernels = {path: layer.sources[path].of(params, ".kernel") for path in units.readers}
    together = jnp.concatenate([one.astype(jnp.float32) for one in kernels.values()], axis=1)
    kept, weights, error = remove_inputs(inputs.gram, together, changes, units.keep)
    ends = np.cumsum([kernel.shape[1] for kernel in kernels.values()])[:-1]
    parts = np.split(fetch(weights), ends, axis=1)
    found.kept[units.capture] = kept
    for (path, kernel), part in zip(kernels.items(), parts, strict=True):
        found.kernels[path] = part.astype(kernel.dtype)
        found.errors[path] = error


def _save(layer: SmallerLayer) -> Saved:
    return Saved(flat(kept=layer.kept, kernels=layer.kernels), {"errors": layer.errors})


def _load(index: int, saved: Saved) -> SmallerLayer:
    arrays = grouped(saved.arrays)
    return SmallerLayer(arrays["kept"], arrays["kernels"], saved.figures["errors"])


def _bits(kept: Int[np.ndarray, "k"], count: int) -> bytes:
    bits = np.zeros(count, np.uint8)
    bits[kept] = 1
    return np.packbits(bits).tobytes()


def _places(bits: bytes, units: Units) -> Int[np.ndarray, "k"]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8))[: units.count])
