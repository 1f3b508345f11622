"""The loop over layers, from top to bottom as the method goes.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> store -> forward -> write
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from convert import Params, Spec, parts
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.models import Architecture
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.layer import SolvedLayer, Solver, timed
from jaxprune.pruning.results import LayerResult, saved_layers
from jaxprune.pruning.rules import TargetOf, by_rules, with_rules
from jaxprune.pruning.sensitivity import Weights
from jaxprune.pruning.store import Stage
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.model import StreamedModel, in_checkpoint


def prune_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    method: Method,
    target: Pattern | TargetOf,
    *,
    weights: Sequence[Weights] | None = None,
    asymmetry: float = 0.0,
    saved: Stage[LayerResult] | None = None,
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
        saved: where layers are saved as soon as they are pruned, and taken from where they are
            saved already.

    Returns:
        An iterator over the layers' results. A layer is pruned when its result is asked for.

    Raises:
        InputError: model, tokens and target do not fit together; raised here, before the first
            layer.
    """
    solver = Solver(method, targets_for(model.architecture, target), weights, asymmetry)
    states = CalibrationStates(model, tokens, with_dense=asymmetry > 0)
    return visit_layers(model, states, solver, saved or saved_layers(None, ""))


def visit_layers(
    model: StreamedModel,
    states: CalibrationStates,
    solver: Solver,
    saved: Stage[LayerResult],
) -> Iterator[LayerResult]:
    """Yields the pruned layers, in order; when a layer is yielded, the states are those before the
    next one.

    Args:
        model: the dense model.
        states: the states before the first layer.
        solver: how layers are pruned.
        saved: see `prune_layers`.
    """
    unfinished = [index for index in range(model.num_layers) if index not in saved]
    read_ahead = model.layers(unfinished)
    for index in range(model.num_layers):
        if found := saved.get(index):
            yield found
            continue
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            stored = next(read_ahead if index in unfinished else model.layers([index]))
            states.catch_up(index, saved)
        result = solve_layer(model, index, stored, states, solver, seconds)
        del stored
        saved.put(index, result)
        states.passed(index, saved)
        yield result
        del result


def solve_layer(
    model: StreamedModel,
    index: int,
    stored: Params,
    states: CalibrationStates,
    solver: Solver,
    seconds: dict[str, float],
) -> LayerResult:
    """Solves the kernels of a layer and moves the hidden states through it.

    Args:
        model: the model that the layer belongs to.
        index: the index of the layer.
        stored: its params, on the host, as its program takes them.
        states: the states before it.
        solver: how.
        seconds: those spent on it so far, by phase.
    """
    part = model.architecture.layers[index]
    with timed(seconds, "read"):
        params = jax.block_until_ready(model.put_layer(index, stored))
    solved = SolvedLayer(model, index, params, (states.pruned, states.dense), solver, seconds)
    del params
    # Only kernels changed; the rest goes out exactly as it came in.
    pruned = part.unstack(stored) | solved.kernels
    with timed(seconds, "forward"):
        if index + 1 < model.num_layers:  # nothing reads the last layer's output
            model.forward(index, model.put_layer(index, part.stack(pruned)), states.pruned)
    return LayerResult(index, in_checkpoint(index, pruned), solved.results, solved.masks, seconds)


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
