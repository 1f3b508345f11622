"""The loop over layers, from top to bottom as the method goes.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> store -> forward -> write
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Int

from convert import Params, Spec, parts
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.models import Architecture
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.layer import Solver, solve_linears
from jaxprune.pruning.results import LayerFigures, LayerResult
from jaxprune.pruning.rules import TargetOf, by_rules, with_rules
from jaxprune.pruning.sensitivity import Weights
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.model import StreamedModel, in_checkpoint
from jaxprune.streaming.sweep import sweep, timed


def prune_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    method: Method,
    target: Pattern | TargetOf,
    *,
    weights: Sequence[Weights] | None = None,
    asymmetry: float = 0.0,
) -> Iterator[LayerResult]:
    """Prunes a model layer by layer; nothing is written.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        method: the pruning method.
        target: a pattern for all linear layers, or (layer index, path) -> its own, which may be a
            mask made elsewhere.
        weights: the weights of the layers' tokens and outputs; see `sensitivity.weights`.
        asymmetry: see `Solver`. Above 0 the dense model goes along: another forward pass.

    Returns:
        An iterator over the layers' results. A layer is pruned when its result is asked for.

    Raises:
        InputError: model, tokens and target do not fit together; raised here, before the first
            layer.
    """
    solver = Solver(method, targets_for(model.architecture, target), weights, asymmetry)
    return sweep_layers(CalibrationStates(model, tokens, with_dense=asymmetry > 0), solver)


def sweep_layers(states: CalibrationStates, solver: Solver) -> Iterator[LayerResult]:
    """Yields the pruned layers, in order.

    Args:
        states: the model, its states before the first layer, and where layers are saved.
        solver: how layers are pruned.
    """
    order, source = range(states.model.num_layers), states.model.layers
    visit = partial(solve_layer, states, solver)
    return sweep(order, source, visit, saved=states.saved, states=states)


def solve_layer(
    states: CalibrationStates,
    solver: Solver,
    index: int,
    stored: Params,
    seconds: dict[str, float],
) -> LayerResult:
    """Solves the kernels of a layer and moves the hidden states through it.

    Args:
        states: the model, and its states before the layer.
        solver: how.
        index: the index of the layer.
        stored: its params, on the host, as its program takes them.
        seconds: those spent on it so far, by phase.
    """
    model, part = states.model, states.model.architecture.layers[index]
    with timed(seconds, "read"):
        params = jax.block_until_ready(model.put_layer(index, stored))
    solved = solve_linears(states, solver, index, params, seconds)
    del params
    # Only kernels changed; the rest goes out exactly as it came in.
    pruned = part.unstack(stored) | solved.kernels
    with timed(seconds, "forward"):
        if index + 1 < model.num_layers:  # nothing reads the last layer's output
            model.forward(index, model.put_layer(index, part.stack(pruned)), states.pruned)
    figures = LayerFigures(index, seconds, solved.results)
    return LayerResult(figures, in_checkpoint(index, pruned), solved.masks)


def targets_for(architecture: Architecture, target: Pattern | TargetOf) -> TargetOf:
    """Returns the target of each linear layer, once it is known to fit; errors as for
    `require_fit`."""
    target_of = (
        with_rules(target, by_rules(architecture, ())) if isinstance(target, Pattern) else target
    )
    for (index, path), shape in architecture.kernel_shapes(routers=True).items():
        if (wanted := target_of(index, path)) is not None:
            require_fit(wanted, index, path, shape)
    return target_of


def require_fit(
    target: Pattern | StoredMask, index: int, path: str, shape: tuple[int, ...]
) -> None:
    """Raises InputError where a pattern is impossible for a kernel's shape, or a mask has
    another."""
    if isinstance(target, Pattern):
        target.selector(shape)
    elif target.shape != shape:
        raise InputError(
            f"the mask of layers.{index}.{path} is {list(target.shape)}, but its kernel [in, out] "
            f"is {list(shape)}: "
            "the mask was made for another model"
        )


def other_params(spec: Spec) -> Iterator[list[str]]:
    """Yields the paths of each part that pruning leaves alone: embedding, final norm, head."""
    return (paths for part, paths in parts(spec).items() if not part.startswith("layers."))
