"""The loop over layers, from top to bottom as the method goes.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> store -> forward -> write
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from convert import Params, Spec, parts
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, gram, with_more_damping
from jaxprune.models import Architecture, Layer
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.gram_matrices import gram_matrices, groups, most_bytes
from jaxprune.pruning.kernel import KernelResult, dense_result, prune_and_round
from jaxprune.pruning.results import LayerResult, Results
from jaxprune.pruning.rules import Target, TargetOf
from jaxprune.pruning.sensitivity import Weights
from jaxprune.sharding import fetch
from jaxprune.sparsity.masks import StoredMask, pack
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel, in_checkpoint

DAMPING = 1, 10, 100, 1000
"""A solve that fails is tried again with so many times the damping."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """How the kernels of a layer are pruned.

    Attributes:
        method: the pruning method.
        target_of: (layer index, path of the linear layer) -> pattern or mask; None: it stays dense.
        weights: the weights of each layer's tokens and outputs; None: all weigh the same.
        asymmetry: share of the inputs' drift from the dense model's that a kernel makes up for; see
            `gram.drifted_target`.
    """

    method: Method
    target_of: TargetOf
    weights: Sequence[Weights] | None = None
    asymmetry: float = 0.0

    def taps(self, index: int, layer: Layer) -> dict[str, tuple[str, ...]]:
        """Returns the taps of a layer that its pruned linear layers read, with these."""
        pruned = {
            tap: tuple(path for path in paths if self.target_of(index, path) is not None)
            for tap, paths in layer.inputs.items()
        }
        return {tap: paths for tap, paths in pruned.items() if paths}


def prune_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    method: Method,
    target: Pattern | TargetOf,
    *,
    weights: Sequence[Weights] | None = None,
    asymmetry: float = 0.0,
    finished: Results | None = None,
) -> Iterator[LayerResult]:
    """Prunes a model layer by layer; nothing is written.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        method: the pruning method.
        target: a pattern for all linear layers, or (layer index, path) -> its own, which may be a mask made elsewhere.
        weights: the weights of the layers' tokens and outputs; see `sensitivity.weights`.
        asymmetry: see `Solver`. Above 0 the dense model goes along: another forward pass.
        finished: where layers are kept as soon as they are pruned, and taken from where they are kept already.

    Returns:
        An iterator over the layers' results. A layer is pruned when its result is asked for.

    Raises:
        InputError: model, tokens and target do not fit together; raised here, before the first layer.
    """
    solver = Solver(method, targets_for(model.architecture, target), weights, asymmetry)
    states = CalibrationStates(model, tokens, with_dense=asymmetry > 0)
    return _visit_layers(model, states, solver, finished or Results(None, "", model.num_layers))


def _visit_layers(
    model: StreamedModel, states: CalibrationStates, solver: Solver, finished: Results
) -> Iterator[LayerResult]:
    unfinished = [index for index in range(model.num_layers) if index not in finished]
    read_ahead = model.layers(unfinished)
    for index in range(model.num_layers):
        if index not in unfinished and (kept := finished.get(index)):
            yield kept
            continue
        seconds: dict[str, float] = {}
        part = model.architecture.layers[index]
        with _timed(seconds, "read"):
            stored = next(read_ahead if index in unfinished else model.layers([index]))
            states.catch_up(index, finished)
            params = jax.block_until_ready(model.put_layer(index, stored))
        solved = solve_layer(model, index, params, (states.pruned, states.dense), solver, seconds)
        del params
        # Only kernels changed; the rest goes out exactly as it came in.
        pruned = part.unstack(stored) | solved.kernels
        del stored
        with _timed(seconds, "forward"):
            if index + 1 < model.num_layers:  # nothing reads the last layer's output
                model.forward(index, model.put_layer(index, part.stack(pruned)), states.pruned)
        result = LayerResult(index, in_checkpoint(index, pruned), solved.results, solved.masks, seconds)
        del solved, pruned
        finished.put(result)
        states.passed(index, finished)
        yield result
        del result


class SolvedLayer:
    """What became of a layer's kernels, on the host.

    Attributes:
        kernels: name of a kernel as in a checkpoint, inside the layer -> the pruned kernel in its stored dtype.
        masks: path of the linear layer -> its packed mask; none of one that stays dense.
        results: path -> what became of its kernel.
    """

    def __init__(self) -> None:
        self.kernels: Params = {}
        self.masks: dict[str, UInt8[np.ndarray, "m _"]] = {}
        self.results: dict[str, KernelResult] = {}


def solve_layer(
    model: StreamedModel,
    index: int,
    params: Mapping[str, Array],
    states: tuple[HiddenStates, HiddenStates | None],
    solver: Solver,
    seconds: dict[str, float],
) -> SolvedLayer:
    """Prunes every kernel of a layer and rounds it to the stored dtype.

    Args:
        model: the model that the layer belongs to.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        states: before the layer, behind pruned layers and, where there are any, behind dense ones, which move on.
        solver: how.
        seconds: to which those by phase are added.

    Raises:
        InputError: a Gram matrix is too nearly singular, whatever the damping, or not finite.
    """
    layer, part = SolvedLayer(), model.architecture.layers[index]
    taps, tokens = solver.taps(index, part), solver.weights[index].tokens if solver.weights else None
    for group in groups(part, list(taps), most_bytes(), model.devices):
        with _timed(seconds, "gram"):
            try:
                grams, drifts = gram_matrices(model, index, params, *states, tokens, group)
                jax.block_until_ready((grams.totals, drifts))
            except InputError as error:
                error.problem = f"layer {index}: {error.problem}"
                raise
        with _timed(seconds, "solve"):
            for tap in group:
                inputs = _Inputs(
                    tap, grams.tokens(tap), model.devices.replicate(grams.take(tap)), drifts.pop(tap, None)
                )
                _solve_damped(model, index, layer, params, taps[tap], inputs, solver)
    for path in part.kernels:
        if solver.target_of(index, path) is None and path not in part.routers:
            layer.results[path] = dense_result(part.sources[path].of(params, ".kernel"))
    layer.results = {path: layer.results[path] for path in part.kernels if path in layer.results}
    return layer


class _Inputs(NamedTuple):
    """What is known of the inputs that some linear layers share.

    Attributes:
        tap: its name.
        tokens: how many an expert was given; None: all.
        gram: their Gram matrix.
        drift: see `gram_matrices`.
    """

    tap: str
    tokens: int | None
    gram: Float[Array, "n n"]
    drift: Float[Array, "n n"] | None


def _solve_damped(
    model: StreamedModel,
    index: int,
    layer: SolvedLayer,
    params: Mapping[str, Array],
    paths: Sequence[str],
    inputs: _Inputs,
    solver: Solver,
) -> None:
    """Prunes the kernels of the linear layers that share an input, with as much damping as they need."""
    least = 1 if inputs.tokens is None else least_damping(inputs.tokens, len(inputs.gram))
    if inputs.tokens == 0:  # nothing is known: all inputs count the same
        inputs = inputs._replace(gram=jnp.eye(len(inputs.gram), dtype=inputs.gram.dtype))
    for times in (least * raised for raised in DAMPING):
        method = solver.method if times == 1 else with_more_damping(solver.method, times)
        _solve_tap(model, index, layer, params, paths, inputs, dataclasses.replace(solver, method=method))
        bad = [path for path in paths if not math.isfinite(layer.results[path].error)]
        if not bad:
            break
    else:
        raise InputError(
            f"layer {index}: {', '.join(bad)} cannot be solved, even with {DAMPING[-1]} times the damping",
            options={"nsamples": Change.RAISE, "damping": Change.RAISE},
        )
    found = {"damping_times": float(times)} if times > 1 else {}
    if inputs.tokens is not None:
        found |= {"tokens": float(inputs.tokens), "inputs": float(len(inputs.gram))}
    for path in paths:
        metrics = layer.results[path].metrics | found
        layer.results[path] = layer.results[path]._replace(metrics=metrics)


def least_damping(tokens: int, inputs: int) -> int:
    """Returns how many times the damping is taken for an expert: 1, or more where its tokens are fewer than its inputs,
    as many times as they are fewer, in powers of 2."""
    return min(DAMPING[-1], 2 ** math.ceil(math.log2(max(1.0, inputs / max(1, tokens)))))


def _solve_tap(
    model: StreamedModel,
    index: int,
    layer: SolvedLayer,
    params: Mapping[str, Array],
    paths: Sequence[str],
    inputs: _Inputs,
    solver: Solver,
) -> None:
    """Prunes the kernels of the linear layers that share an input."""
    prepared, sources = solver.method.prepare(inputs.gram), model.architecture.layers[index].sources
    for path in paths:
        kernel, wanted = sources[path].of(params, ".kernel"), None
        target = solver.target_of(index, path)
        assert target is not None
        if inputs.drift is not None:
            dense = kernel.astype(inputs.gram.dtype)
            wanted = gram.drifted_target(inputs.gram, inputs.drift, dense, solver.asymmetry)
        outputs = solver.weights[index].outputs.get(path) if solver.weights else None
        pruned, mask, layer.results[path] = prune_and_round(
            solver.method,
            prepared,
            inputs.gram,
            kernel,
            target,
            outputs=outputs,
            wanted=wanted,
            devices=model.devices,
        )
        layer.kernels[f"{path}.kernel"], layer.masks[path] = fetch((pruned, pack(mask)))


def targets_for(architecture: Architecture, target: Pattern | TargetOf) -> TargetOf:
    """Returns the target of each linear layer, once it is known to fit; errors as for `require_fit`."""

    def usual(index: int, path: str) -> Target:
        return None if architecture.is_router(index, path) else target

    target_of = target if callable(target) else usual
    for (index, path), shape in architecture.kernel_shapes(routers=True).items():
        if (wanted := target_of(index, path)) is not None:
            require_fit(wanted, index, path, shape)
    return target_of


def require_fit(target: Pattern | StoredMask, index: int, path: str, shape: tuple[int, ...]) -> None:
    """Raises InputError where a pattern is impossible for a kernel's shape, or a mask has another."""
    if isinstance(target, Pattern):
        target.selector(shape)
    elif target.shape != shape:
        raise InputError(
            f"the mask of layers.{index}.{path} is {list(target.shape)}, but its kernel [in, out] is {list(shape)}: "
            "the mask was made for another model"
        )


def other_params(spec: Spec) -> Iterator[list[str]]:
    """Yields the paths of each part that pruning leaves alone: embedding, final norm, head."""
    return (paths for part, paths in parts(spec).items() if not part.startswith("layers."))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
