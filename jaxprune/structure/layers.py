"""Chooses whole decoder layers, and removes them.

One layer after another is chosen: the one without which the model's predictions differ least from
the dense model's, beside those that are chosen already.

References:
    Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks" (ICML 2024, arXiv 2402.09025), which chooses by perplexity.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from convert import Params
from convert.checkpoint import RenamedReader, part_of
from jaxprune.costs.program import PhaseCosts, Program
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.evaluation import perplexity
from jaxprune.recipe_parts import Structure
from jaxprune.run_store.context import NO_STORE, Context
from jaxprune.run_store.store import LAYERS
from jaxprune.solve.sensitivity import evenly_spaced
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import sweep
from jaxprune.structure.sizes import kept_layers, removal_of

WINDOWS = 16
"""The number of calibration windows that divergences are measured on."""
AT_A_TIME = 4
"""The candidates that are compared with the dense model at a time."""


class Dropped(NamedTuple):
    """Layers that are removed.

    Attributes:
        layers: their indices, in the order in which they were chosen.
        divergences: the KL divergence from the dense model after each of them, in nats a token;
            empty if they were named.
    """

    layers: list[int]
    divergences: list[float]


def without_layers(model: StreamedModel, dropped: Collection[int]) -> StreamedModel:
    """Returns the model without some of its layers; the others are renumbered.

    Args:
        model: the whole model.
        dropped: the indices of the layers.

    Raises:
        InputError: see `sizes.removals`.
    """
    structure = Structure().naming_layers(sorted(dropped))
    entries = model.changed_entries
    removal = removal_of(model.architecture, model.reader.assets, "layers", structure, entries)
    kept = kept_layers(structure, model.architecture)
    places = {f"layers.{index}": f"layers.{place}" for place, index in enumerate(kept)}
    paths: dict[str, str] = {}
    for path in model.reader.spec:
        part = part_of(path)
        place = places.get(part) if part.startswith("layers.") else part
        if place is not None:
            paths[place + path.removeprefix(part)] = path
    return model.derived(RenamedReader(model.reader, paths, removal.changes))


def dropped_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    structure: Structure,
    context: Context = NO_STORE,
) -> Dropped:
    """Returns the layers that a recipe removes: those that it names, else the least important ones.

    The hidden states of the windows without each of the layers are on the host together.

    Args:
        model: the whole model.
        tokens: calibration windows, [windows, length] token ids. At most 16 of them, evenly spaced,
            are used.
        structure: what is removed.
        context: its store saves finished steps, its observer is notified of progress.
    """
    if structure.named_layers:
        return Dropped(structure.named_layers, [])
    windows = evenly_spaced(tokens, WINDOWS)
    stay = list(range(model.num_layers))
    dense: HiddenStates | None = None
    found = Dropped([], [])
    for step in range(structure.layer_count):
        saved = context.store and context.store.get(f"{LAYERS}/{step}")
        if saved:
            divergences = saved.arrays["divergences"]
        else:
            what = f"choosing layer {step + 1} of {structure.layer_count} to remove"
            context.observer.started(what, len(stay))
            dense = dense or model.final_states(windows)[0]
            divergences = _divergences(model, windows, stay, dense, context)
            if context.store:
                context.store.put(f"{LAYERS}/{step}", {"divergences": divergences}, {})
        least = int(np.argmin(np.where(np.isfinite(divergences), divergences, np.inf)))
        found.layers.append(stay.pop(least))
        found.divergences.append(float(divergences[least]))
    return found


def _divergences(
    model: StreamedModel,
    windows: Int[np.ndarray, "w t"],
    stay: Sequence[int],
    dense: HiddenStates,
    context: Context,
) -> Float[np.ndarray, "n"]:
    """Returns the divergence from the dense model without each of the layers that stay."""
    whole, without = model.embed(windows), dict[int, HiddenStates]()

    def visit(index: int, stored: Params, _: dict[str, float]) -> None:
        params = model.put_layer(index, stored)
        for states in without.values():
            model.forward(index, params, states)
        without[index] = whole.copy()
        if index != stay[-1]:
            model.forward(index, params, whole)
        context.observer.layer_visited(index)

    for _ in sweep(stay, model.layers, visit):
        pass
    states, found = [*without.values()], list[float | None]()
    for start in range(0, len(states), AT_A_TIME):
        compared = [dense, *states[start : start + AT_A_TIME]]
        quality = perplexity.compare([model] * len(compared), compared, windows)
        found += [one.kl for one in quality[1:]]
    return np.array(found, np.float64)


def costs(run: RunSizes) -> PhaseCosts:
    """Returns what choosing layers costs. Which ones will be chosen is not known: the last ones are
    assumed."""
    count, windows = run.recipe.structure.layer_count, min(WINDOWS, run.windows)
    layers = len(run.architecture.layers)
    each, weights = run.states_bytes(windows), run.devices.count * run.stored_bytes("layers.")
    left = [layers - step for step in range(count)]
    moves = layers + sum(n * (n + 1) // 2 - 1 for n in left)
    compared = sum(n + -(-n // AT_A_TIME) for n in left)
    moved = weights * (1 + sum(left) / layers) + each * (2 * moves + compared)
    return PhaseCosts(programs(run), (layers + 2) * each, {"layers": moved})


def programs(run: RunSizes) -> Iterator[Program]:
    """Yields the programs that choose layers."""
    before = run.removal_of("layers").before
    shapes, windows = run.shapes_of(before), min(WINDOWS, run.windows)
    layers, x = before.layers, shapes.batch(windows, run.length)
    passes = Counter(layers)
    left = [len(layers) - step for step in range(run.recipe.structure.layer_count)]
    for n in left:
        for place, layer in enumerate(layers[:n]):
            passes[layer] += place + (place + 1 < n)
    for layer, number in passes.items():
        yield shapes.forward("layers", layer, x, number * windows)
    sizes = Counter(1 + min(AT_A_TIME, n - start) for n in left for start in range(0, n, AT_A_TIME))
    for models, calls in sizes.items():
        yield perplexity.comparison("layers", shapes, windows * (run.length - 1), models, calls)
