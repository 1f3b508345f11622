"""The loop over layers, from top to bottom as the method goes.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> store -> forward -> write
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from convert import Spec, parts
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, gram, with_more_damping
from jaxprune.models import Architecture, Layer
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.gram_matrices import Grams, gram_matrices
from jaxprune.pruning.kernel import KernelResult, dense_result, prune_and_round
from jaxprune.pruning.results import LayerResult, Results
from jaxprune.pruning.rules import TargetOf
from jaxprune.pruning.sensitivity import Weights
from jaxprune.sharding import fetch
from jaxprune.sparsity.masks import StoredMask, pack
from jaxprune.sparsity.patterns import Pattern
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
        with _timed(seconds, "read"):
            stored = next(read_ahead if index in unfinished else model.layers([index]))
            states.catch_up(index, finished)
            params = jax.block_until_ready(model.devices.replicate(stored))
        with _timed(seconds, "gram"):
            tokens = solver.weights[index].tokens if solver.weights else None
            taps = solver.taps(index, model.architecture.layers[index])
            try:
                grams, drifts = jax.block_until_ready(
                    gram_matrices(model, index, params, states.pruned, states.dense, tokens, taps)
                )
            except InputError as error:
                error.problem = f"layer {index}: {error.problem}"
                raise
        with _timed(seconds, "solve"):
            pruned = solve_layer(model, index, params, grams, drifts, solver)
            jax.block_until_ready(pruned.params)
        del params
        with _timed(seconds, "forward"):
            if index + 1 < model.num_layers:  # nothing reads the last layer's output
                model.forward(index, pruned.params, states.pruned)
        # Only kernels changed; the rest goes out exactly as it came in.
        changed = {f"{path}.kernel": fetch(pruned.params[f"{path}.kernel"]) for path in pruned.kernels}
        result = LayerResult(
            index, in_checkpoint(index, stored | changed), pruned.kernels, fetch(pruned.masks), seconds
        )
        del stored, changed, pruned
        finished.put(result)
        states.passed(index, finished)
        yield result
        del result


class SolvedLayer:
    """A layer whose kernels are pruned.

    Attributes:
        params: the params of the layer, on the device, in the stored dtype.
        kernels: path of the linear layer -> what became of its kernel.
        masks: path -> its packed mask, on the device; none of one that stays dense.
    """

    def __init__(self, params: Mapping[str, Array]) -> None:
        self.params: dict[str, Array] = dict(params)
        self.kernels: dict[str, KernelResult] = {}
        self.masks: dict[str, UInt8[Array, "m _"]] = {}


def solve_layer(
    model: StreamedModel, index: int, params: Mapping[str, Array], grams: Grams, drifts: Grams, solver: Solver
) -> SolvedLayer:
    """Prunes every kernel of a layer and rounds it to the stored dtype.

    Args:
        model: the model that the layer belongs to.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        grams: tap -> Gram matrix; each is let go once its kernels are solved.
        drifts: tap -> drift, or empty; see `gram_matrices`.
        solver: how.

    Raises:
        InputError: a Gram matrix is too nearly singular, whatever the damping.
    """
    layer = SolvedLayer(params)
    part = model.architecture.layers[index]
    for path in part.kernels:
        if solver.target_of(index, path) is None:
            layer.kernels[path] = dense_result(params[f"{path}.kernel"])
    for tap, paths in solver.taps(index, part).items():
        gram_of_tap, drift = grams.pop(tap), drifts.pop(tap, None)
        for times in DAMPING:
            method = solver.method if times == 1 else with_more_damping(solver.method, times)
            _solve_tap(
                model, index, layer, params, paths, gram_of_tap, drift, dataclasses.replace(solver, method=method)
            )
            bad = [path for path in paths if not math.isfinite(layer.kernels[path].error)]
            if not bad:
                break
        else:
            raise InputError(
                f"layer {index}: {', '.join(bad)} cannot be solved, even with {DAMPING[-1]} times the damping",
                options={"nsamples": Change.RAISE, "damping": Change.RAISE},
            )
        if times > 1:
            for path in paths:
                metrics = layer.kernels[path].metrics | {"damping_times": float(times)}
                layer.kernels[path] = layer.kernels[path]._replace(metrics=metrics)
    layer.kernels = {path: layer.kernels[path] for path in part.kernels}
    return layer


def _solve_tap(
    model: StreamedModel,
    index: int,
    layer: SolvedLayer,
    params: Mapping[str, Array],
    paths: Sequence[str],
    gram_of_tap: Array,
    drift: Array | None,
    solver: Solver,
) -> None:
    """Prunes the kernels of the linear layers that share an input."""
    prepared = solver.method.prepare(gram_of_tap)
    for path in paths:
        kernel, wanted, target = params[f"{path}.kernel"], None, solver.target_of(index, path)
        assert target is not None
        if drift is not None:
            wanted = gram.drifted_target(gram_of_tap, drift, kernel.astype(gram_of_tap.dtype), solver.asymmetry)
        outputs = solver.weights[index].outputs.get(path) if solver.weights else None
        layer.params[f"{path}.kernel"], mask, layer.kernels[path] = prune_and_round(
            solver.method,
            prepared,
            gram_of_tap,
            kernel,
            target,
            outputs=outputs,
            wanted=wanted,
            devices=model.devices,
        )
        layer.masks[path] = pack(mask)


def targets_for(architecture: Architecture, target: Pattern | TargetOf) -> TargetOf:
    """Returns the target of each linear layer, once it is known to fit; errors as for `require_fit`."""
    target_of = target if callable(target) else lambda index, path: target
    for (index, path), shape in architecture.kernel_shapes().items():
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
    seconds[phase] = time.perf_counter() - start
