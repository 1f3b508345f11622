"""The loop over layers, from first to last.

tokens -> embed -> hidden states (host)
  layer i:  read -> captured activations -> Gram matrices -> solve -> store -> forward -> write
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import Int

from convert import Spec, parts
from jaxprune.methods import Method
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.layer import Solver, solve_layer
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.rules import TargetOf, targets_for
from jaxprune.solve.sensitivity import Weights
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import sweep


def prune_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    method: Method,
    target: Pattern | TargetOf,
    *,
    weights: Sequence[Weights] | None = None,
    asymmetry: float = 0.0,
) -> Iterator[LayerResult]:
    """Prunes a model layer by layer; writes no files.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        method: the pruning method.
        target: a pattern for all linear layers, or (layer index, path) -> pattern or mask of each.
        weights: the weights of each layer's tokens and outputs; see `sensitivity.weights`.
        asymmetry: see `Solver`. Above 0, each layer needs another forward pass, for the dense
            model.

    Returns:
        An iterator over the layers' results, which prunes lazily.

    Raises:
        InputError: model, tokens and target do not fit together. This is raised before the first
            layer.
    """
    solver = Solver(method, targets_for(model.architecture, target), weights, asymmetry)
    return sweep_layers(CalibrationStates(model, tokens, with_dense=asymmetry > 0), solver)


def sweep_layers(states: CalibrationStates, solver: Solver) -> Iterator[LayerResult]:
    """Yields the pruned layers, in order.

    Args:
        states: the model, its states before the first layer, and where layers are saved.
        solver: how to prune.
    """
    order, source = range(states.model.num_layers), states.model.layers
    visit = partial(solve_layer, states, solver)
    return sweep(order, source, visit, saved=states.saved, states=states)


def other_params(spec: Spec) -> Iterator[list[str]]:
    """Yields the paths of each part that is not pruned: embedding, final norm, head."""
    return (paths for part, paths in parts(spec).items() if not part.startswith("layers."))
