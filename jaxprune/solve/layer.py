"""One layer pruned: Gram matrices of its inputs -> solves -> kernels on the host, for some inputs
after others."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from convert import Params
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, gram, with_more_damping
from jaxprune.models import Layer
from jaxprune.sharding import ONE_DEVICE, Devices, fetch
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.gram_matrices import gram_matrices, groups, most_bytes
from jaxprune.solve.kernel import KernelResult, Linear, dense_result, prune_and_round
from jaxprune.solve.layer_result import LayerResult, LayerSummary
from jaxprune.solve.sensitivity import Weights
from jaxprune.solve.targets import TargetOf
from jaxprune.sparsity.masks import pack
from jaxprune.streaming.model import in_checkpoint
from jaxprune.streaming.sweep import timed

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
        quantization: see `prune_and_round`.
    """

    method: Method
    target_of: TargetOf
    weights: Sequence[Weights] | None = None
    asymmetry: float = 0.0
    quantization: str | None = None

    def taps(self, index: int, layer: Layer) -> dict[str, tuple[str, ...]]:
        """Returns the taps of a layer that its pruned linear layers read, with these."""
        pruned = {
            tap: tuple(path for path in paths if self.target_of(index, path) is not None)
            for tap, paths in layer.inputs.items()
        }
        return {tap: paths for tap, paths in pruned.items() if paths}

    def outputs(self, index: int) -> Mapping[str, Float[np.ndarray, "m"]]:
        """Returns the weights of a layer's outputs, by the path of the linear layer; none where all
        weigh the same."""
        return self.weights[index].outputs if self.weights else {}


class SolvedLayer(NamedTuple):
    """The kernels of a layer, pruned.

    Attributes:
        kernels: name of a kernel as in a checkpoint, inside the layer -> the pruned kernel in its
            stored dtype, on the host.
        masks: path of the linear layer -> its packed mask; none of one that stays dense.
        results: path -> what became of its kernel.
    """

    kernels: Params
    masks: dict[str, UInt8[np.ndarray, "m _"]]
    results: dict[str, KernelResult]


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
    figures = LayerSummary(index, seconds, solved.results)
    return LayerResult(figures, in_checkpoint(index, pruned), solved.masks)


def solve_linears(
    states: CalibrationStates,
    solver: Solver,
    index: int,
    params: Mapping[str, Array],
    seconds: dict[str, float],
) -> SolvedLayer:
    """Prunes the kernels of a layer.

    Args:
        states: the model, and its states before the layer, of which those after dense layers move
            on.
        solver: how.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        seconds: to which those by phase are added.

    Raises:
        InputError: a Gram matrix is too nearly singular, whatever the damping, or not finite.
    """
    kernels, masks, results = SolvedLayer({}, {}, {})
    part, outputs = states.model.architecture.layers[index], solver.outputs(index)
    solve = partial(
        solve_kernels,
        method=solver.method,
        asymmetry=solver.asymmetry,
        quantization=solver.quantization,
        devices=states.model.devices,
    )
    for tap, inputs in layer_inputs(states, solver, index, params, seconds):
        linears = {
            path: Linear(
                partial(part.sources[path].of, params, ".kernel"),
                target,
                outputs.get(path),
                part.sections.get(path, ()),
            )
            for path in part.inputs[tap]
            if (target := solver.target_of(index, path)) is not None
        }
        with timed(seconds, "solve"):
            for path, kernel, mask, result in solve(inputs, linears):
                kernels[f"{path}.kernel"], masks[path], results[path] = kernel, mask, result
        if bad := [path for path in linears if not math.isfinite(results[path].error)]:
            raise InputError(
                f"layer {index}: {', '.join(bad)} cannot be solved, even with {DAMPING[-1]} "
                "times the damping",
                options={"nsamples": Change.RAISE, "damping": Change.RAISE},
            )
        del inputs, linears  # before the next are made
    for path in part.kernels:
        if solver.target_of(index, path) is None and path not in part.routers:
            dense = part.sources[path].of(params, ".kernel")
            results[path] = dense_result(dense, part.sections.get(path, ()))
    ordered = {path: results[path] for path in part.kernels if path in results}
    return SolvedLayer(kernels, masks, ordered)


class Inputs(NamedTuple):
    """What is known of the inputs that some linear layers share.

    Attributes:
        tokens: how many an expert was given; None: all.
        gram: their Gram matrix.
        drift: see `gram_matrices`.
    """

    tokens: int | None
    gram: Float[Array, "n n"]
    drift: Float[Array, "n n"] | None


def layer_inputs(
    states: CalibrationStates,
    solver: Solver,
    index: int,
    params: Mapping[str, Array],
    seconds: dict[str, float],
) -> Iterator[tuple[str, Inputs]]:
    """Yields the inputs of a layer's pruned linear layers by their taps: all that its solves know
    of the model.

    Args: as for `solve_linears`.

    Raises:
        InputError: a Gram matrix is not finite.
    """
    model, part = states.model, states.model.architecture.layers[index]
    tokens = solver.weights[index].tokens if solver.weights else None
    taps = list(solver.taps(index, part))
    # no Gram matrices are summed, which otherwise moves the dense states
    if not taps and states.dense:
        model.forward(index, params, states.dense)
    for group in groups(part, taps, most_bytes(), model.devices):
        with timed(seconds, "gram"):
            try:
                grams, drifts = gram_matrices(states, index, params, tokens, group)
                jax.block_until_ready((grams.totals, drifts))
            except InputError as error:
                error.problem = f"layer {index}: {error.problem}"
                raise
        for tap in group:
            yield (
                tap,
                Inputs(
                    grams.tokens(tap),
                    model.devices.replicate(grams.take(tap)),
                    drifts.pop(tap, None),
                ),
            )
        del grams, drifts  # before those of the next group are made


def solve_kernels(
    inputs: Inputs,
    linears: Mapping[str, Linear],
    method: Method,
    *,
    asymmetry: float = 0.0,
    quantization: str | None = None,
    devices: Devices = ONE_DEVICE,
) -> Iterator[tuple[str, Float[np.ndarray, "n m"], UInt8[np.ndarray, "m _"], KernelResult]]:
    """Prunes the kernels of the linear layers that share an input, with as much damping as they
    need.

    Args:
        inputs: the inputs.
        linears: path -> linear layer.
        method: the pruning method.
        asymmetry: see `Solver`.
        quantization: see `prune_and_round`.
        devices: see `prune_and_round`.

    Yields:
        Path, pruned kernel in its stored dtype, packed mask, and result. If an error is not finite,
        all paths follow again with more damping; use the last result of each path. Its error is not
        finite if no damping is enough.
    """
    least = 1 if inputs.tokens is None else least_damping(inputs.tokens, len(inputs.gram))
    if inputs.tokens == 0:  # nothing is known: all inputs count the same
        inputs = inputs._replace(gram=jnp.eye(len(inputs.gram), dtype=inputs.gram.dtype))
    for times in (least * raised for raised in DAMPING):
        damped = method if times == 1 else with_more_damping(method, times)
        prepared, finite = damped.prepare(inputs.gram), True
        found = {"damping_times": float(times)} if times > 1 else {}
        if inputs.tokens is not None:
            found |= {"tokens": float(inputs.tokens), "inputs": float(len(inputs.gram))}
        for path, linear in linears.items():
            kernel = linear.kernel()
            pruned, mask, result = prune_and_round(
                damped,
                prepared,
                inputs.gram,
                kernel,
                linear,
                wanted=_wanted(kernel, inputs, asymmetry),
                quantization=quantization,
                devices=devices,
            )
            solved = fetch((pruned, pack(mask)))
            del kernel, pruned, mask  # before the next
            finite &= math.isfinite(result.error)
            yield path, *solved, dataclasses.replace(result, stats=result.stats | found)
        if finite:
            return
        del prepared  # before it is made again


def _wanted(
    kernel: Float[Array, "n m"], inputs: Inputs, asymmetry: float
) -> Float[Array, "n m"] | None:
    """Returns the kernel whose outputs are wanted; None: the dense one."""
    if inputs.drift is None:
        return None
    return gram.drifted_target(
        inputs.gram, inputs.drift, kernel.astype(inputs.gram.dtype), asymmetry
    )


def least_damping(tokens: int, inputs: int) -> int:
    """Returns how many times the damping is taken for an expert: 1, or more where its tokens are
    fewer than its inputs, as many times as they are fewer, in powers of 2."""
    return min(DAMPING[-1], 2 ** math.ceil(math.log2(max(1.0, inputs / max(1, tokens)))))
