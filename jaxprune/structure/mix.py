"""Chooses how many layers, heads and channels to remove, so that a fraction of the parameters goes.

The first mix is of channels alone. Then heads are removed step by step instead of channels, as long
as the divergence from the dense model falls; then layers in the same way. Each mix is removed from
the model on some calibration windows, and compared with the dense model on others.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from convert.assets import load_config
from convert.schema import FiniteOrNull
from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.recipe_parts import Structure
from jaxprune.run_store.context import NO_STORE, Context
from jaxprune.run_store.store import MIXES
from jaxprune.solve.sensitivity import evenly_spaced
from jaxprune.streaming.model import StreamedModel
from jaxprune.structure.layers import dropped_layers
from jaxprune.structure.sizes import (
    first_mix,
    head_groups,
    layer_parameters,
    smaller_architecture,
    with_channels,
)

WINDOWS = 16
"""The number of calibration windows that a mix is removed on, and of others that it is compared
on."""
STEPS = 4
"""The number of steps in which heads alone, or layers alone, would make up for the fraction."""
Removing = Callable[[StreamedModel, Int[np.ndarray, "w t"], Structure], StreamedModel]
"""Removes the parts of a structure from a model, on calibration windows."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mix that was tried.

    Attributes:
        structure: what it removes.
        removed: the fraction of the decoder layers' parameters that this is.
        divergence: the KL divergence from the dense model, in nats a token.
    """

    structure: Structure
    removed: float
    divergence: FiniteOrNull


@dataclasses.dataclass(frozen=True)
class Mix:
    """The mix of parts that a run removes.

    Attributes:
        structure: what it removes.
        candidates: all mixes that were tried, in order.
    """

    structure: Structure
    candidates: list[Candidate]


def chosen_mix(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    structure: Structure,
    removing: Removing,
    context: Context = NO_STORE,
) -> Mix:
    """Returns the mix of least divergence among those that are tried.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids. At most 32 of them, evenly spaced,
            are used.
        structure: how many parameters are removed.
        removing: removes the parts of a mix.
        context: its store saves the divergence of each mix, its observer is notified of progress.

    Raises:
        InputError: see `sizes.first_mix`.
    """
    architecture, assets = model.architecture, model.reader.assets
    share, layers = structure.drop_parameters, len(architecture.layers)
    groups = head_groups(load_config(assets, {}))
    some = evenly_spaced(tokens, 2 * WINDOWS)
    fitted, held = some[::2], some[1::2] if len(some) > 1 else some
    dense = model.final_states(held)
    tried: list[Candidate] = []

    def attempt(mix: Structure) -> Candidate:
        name, number = f"{MIXES}/{len(tried)}", len(tried) + 1
        what = f"trying mix {number}: {', '.join(mix.removed.values())}"
        context.observer.started(what, 1, unit="mixes")
        saved = context.store and context.store.get(name)
        if saved:
            divergence = float(saved.arrays["divergence"][0])
        else:
            smaller = removing(model, fitted, mix)
            states = [*dense, *smaller.final_states(held)]
            found = perplexity.compare([model, smaller], states, held)[1].kl
            assert found is not None
            divergence = found
            if context.store:
                context.store.put(name, {"divergence": np.array([divergence])}, {})
        smaller_layers = layer_parameters(smaller_architecture(architecture, assets, mix))
        removed = 1 - smaller_layers / layer_parameters(architecture)
        tried.append(Candidate(mix, removed, divergence))
        context.observer.layer_visited(0)
        return tried[-1]

    def with_heads(mix: Structure, step: int) -> Structure | None:
        count = step * max(1, round(share * groups / STEPS))
        return dataclasses.replace(mix, drop_heads=count / groups) if count < groups else None

    def without_more_layers(mix: Structure, step: int) -> Structure | None:
        count = mix_layers + step * max(1, round(share * layers / STEPS))
        if count >= layers:
            return None
        wanted = dataclasses.replace(structure, drop_parameters=0.0, drop_layers=count)
        return mix.naming_layers(dropped_layers(model, tokens, wanted, context).layers)

    first = first_mix(architecture, assets, structure)
    mix_layers = first.layer_count
    if mix_layers:
        wanted = dataclasses.replace(first, drop_channels=0.0)
        first = first.naming_layers(dropped_layers(model, tokens, wanted, context).layers)
    best = attempt(first)
    for part in (with_heads, without_more_layers):
        begun, step = best.structure, 1
        while mix := part(dataclasses.replace(begun, drop_channels=0.0), step):
            filled = _filled(model, mix, share)
            if filled is None:
                break
            candidate = attempt(filled)
            if not _value(candidate) < _value(best):
                break
            best, step = candidate, step + 1
    return Mix(best.structure, tried)


def _value(candidate: Candidate) -> float:
    """Returns the divergence of a candidate; infinity if it is not finite."""
    divergence = candidate.divergence
    return divergence if divergence is not None and np.isfinite(divergence) else np.inf


def _filled(model: StreamedModel, mix: Structure, share: float) -> Structure | None:
    """Returns a mix with channels that make up for the share; None if there are too few, or the
    family cannot have so few heads."""
    try:
        return with_channels(model.architecture, model.reader.assets, mix, share)
    except InputError:
        return None
