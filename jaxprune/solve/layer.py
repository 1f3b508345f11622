"""Prunes one layer.

The Gram matrices of some inputs are summed, their kernels pruned and moved to the host. Then the
next inputs follow.
"""

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
from jaxprune.solve.rules import TargetOf
from jaxprune.solve.sensitivity import Weights
from jaxprune.sparsity.masks import pack
from jaxprune.streaming.model import StreamedModel, in_checkpoint
from jaxprune.streaming.sweep import timed

DAMPING = 1, 10, 100, 1000
"""A solve that fails is repeated with the damping times these factors."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """How to prune the kernels of a layer.

    Attributes:
        method: the pruning method.
        target_of: (layer index, path of the linear layer) -> pattern or mask; None: it stays dense.
        weights: the weights of each layer's tokens and outputs; None: all are 1.
        asymmetry: the fraction of the activation shift that a kernel compensates; see
            `gram.shifted_target`.
        quantization: see `prune_and_round`.
    """

    method: Method
    target_of: TargetOf
    weights: Sequence[Weights] | None = None
    asymmetry: float = 0.0
    quantization: str | None = None

    def captures(self, index: int, layer: Layer) -> dict[str, tuple[str, ...]]:
        """Returns captured activations -> pruned linear layers that read them."""
        pruned = {
            capture: tuple(path for path in paths if self.target_of(index, path) is not None)
            for capture, paths in layer.inputs.items()
        }
        return {capture: paths for capture, paths in pruned.items() if paths}

    def outputs(self, index: int) -> Mapping[str, Float[np.ndarray, "m"]]:
        """Returns path of the linear layer -> weights of its outputs; empty if all are 1."""
        return self.weights[index].outputs if self.weights else {}


class SolvedLayer(NamedTuple):
    """The pruned kernels of a layer.

    Attributes:
        kernels: name in the checkpoint, relative to the layer -> pruned kernel in its stored dtype,
            on the host.
        masks: path of the linear layer -> packed mask. Layers that stay dense have none.
        results: path -> statistics of the kernel.
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
    """Prunes the kernels of a layer and moves the hidden states through it.

    Args:
        states: the model, and its states before the layer.
        solver: how to prune.
        index: the index of the layer.
        stored: the layer's params on the host, in the form that its program takes.
        seconds: seconds by phase so far; those of this call are added.
    """
    model, part = states.model, states.model.architecture.layers[index]
    with timed(seconds, "read"):
        params = jax.block_until_ready(model.put_layer(index, stored))
    solved = solve_linears(states, solver, index, params, seconds)
    del params
    # Other params keep their stored bytes.
    pruned = part.unstack(stored) | solved.kernels
    with timed(seconds, "forward"):
        if index + 1 < model.num_layers:  # the last layer's output is not needed
            model.forward(index, model.put_layer(index, part.stack(pruned)), states.pruned)
    figures = LayerSummary(index, seconds, solved.results)
    return LayerResult(figures, in_checkpoint(index, pruned), solved.masks)


def unsolved_layer(
    model: StreamedModel,
    target_of: TargetOf,
    index: int,
    stored: Params,
    seconds: dict[str, float],
) -> LayerResult:
    """Returns a layer as it is, with masks that keep every weight.

    Args:
        model: the model.
        target_of: (layer index, path of the linear layer) -> None: it gets no mask, so that nothing
            tunes it.
        index: the index of the layer.
        stored: the layer's params on the host, in the form that its program takes.
        seconds: seconds by phase so far.
    """
    layer = model.architecture.layers[index]
    params, masks, results = layer.unstack(stored), {}, {}
    for path in layer.kernels:
        wanted = target_of(index, path) is not None
        if wanted or path not in layer.routers:
            kernel = jnp.asarray(params[f"{path}.kernel"])
            results[path] = dense_result(kernel, layer.projections.get(path, ()))
            if wanted:
                masks[path] = fetch(pack(jnp.ones(kernel.shape, jnp.bool_)))
    return LayerResult(LayerSummary(index, seconds, results), in_checkpoint(index, params), masks)


def solve_linears(
    states: CalibrationStates,
    solver: Solver,
    index: int,
    params: Mapping[str, Array],
    seconds: dict[str, float],
) -> SolvedLayer:
    """Prunes the kernels of a layer.

    Args:
        states: the model, and its states before the layer. States of the dense model move to its
            output.
        solver: how to prune.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        seconds: seconds by phase so far; those of this call are added.

    Raises:
        InputError: a Gram matrix is not finite, or nearly singular even with the largest damping.
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
    for capture, inputs in layer_inputs(states, solver, index, params, seconds):
        linears = {
            path: Linear(
                partial(part.sources[path].of, params, ".kernel"),
                target,
                outputs.get(path),
                part.projections.get(path, ()),
            )
            for path in part.inputs[capture]
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
        del inputs, linears  # frees memory before the next are made
    for path in part.kernels:
        if solver.target_of(index, path) is None and path not in part.routers:
            dense = part.sources[path].of(params, ".kernel")
            results[path] = dense_result(dense, part.projections.get(path, ()))
    ordered = {path: results[path] for path in part.kernels if path in results}
    return SolvedLayer(kernels, masks, ordered)


class Inputs(NamedTuple):
    """The inputs that some linear layers share.

    Attributes:
        tokens: number of tokens routed to an expert; None: all tokens.
        gram: their Gram matrix.
        shift: their activation shift; see `gram_matrices`.
    """

    tokens: int | None
    gram: Float[Array, "n n"]
    shift: Float[Array, "n n"] | None


def layer_inputs(
    states: CalibrationStates,
    solver: Solver,
    index: int,
    params: Mapping[str, Array],
    seconds: dict[str, float],
) -> Iterator[tuple[str, Inputs]]:
    """Yields captured activations and inputs of a layer's pruned linear layers.

    The solves depend on the model only through these.

    Args: as for `solve_linears`.

    Raises:
        InputError: a Gram matrix is not finite.
    """
    model, part = states.model, states.model.architecture.layers[index]
    tokens = solver.weights[index].tokens if solver.weights else None
    captures = list(solver.captures(index, part))
    # Otherwise the pass for the Gram matrices moves the dense states.
    if not captures and states.dense:
        model.forward(index, params, states.dense)
    for group in groups(part, captures, most_bytes(), model.devices):
        with timed(seconds, "gram"):
            try:
                grams, shifts = gram_matrices(states, index, params, tokens, group)
                jax.block_until_ready((grams.totals, shifts))
            except InputError as error:
                error.problem = f"layer {index}: {error.problem}"
                raise
        for capture in group:
            yield (
                capture,
                Inputs(
                    grams.tokens(capture),
                    model.devices.replicate(grams.take(capture)),
                    shifts.pop(capture, None),
                ),
            )
        del grams, shifts  # frees memory before the next group


def solve_kernels(
    inputs: Inputs,
    linears: Mapping[str, Linear],
    method: Method,
    *,
    asymmetry: float = 0.0,
    quantization: str | None = None,
    devices: Devices = ONE_DEVICE,
) -> Iterator[tuple[str, Float[np.ndarray, "n m"], UInt8[np.ndarray, "m _"], KernelResult]]:
    """Prunes the kernels of linear layers that share an input, with sufficient damping.

    Args:
        inputs: the inputs.
        linears: path -> linear layer.
        method: the pruning method.
        asymmetry: see `Solver`.
        quantization: see `prune_and_round`.
        devices: see `prune_and_round`.

    Yields:
        Path, pruned kernel in its stored dtype, packed mask, and statistics. If an error is not
        finite, all paths follow again with more damping; use the last result of each path. Its
        error is not finite if no damping suffices.
    """
    least = 1 if inputs.tokens is None else least_damping(inputs.tokens, len(inputs.gram))
    if inputs.tokens == 0:  # without tokens, all inputs count equally
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
            del kernel, pruned, mask  # frees memory before the next
            finite &= math.isfinite(result.error)
            yield path, *solved, dataclasses.replace(result, stats=result.stats | found)
        if finite:
            return
        del prepared  # frees memory before the next attempt


def _wanted(
    kernel: Float[Array, "n m"], inputs: Inputs, asymmetry: float
) -> Float[Array, "n m"] | None:
    """Returns the kernel whose outputs are the target of the solve; None: the dense one."""
    if inputs.shift is None:
        return None
    return gram.shifted_target(
        inputs.gram, inputs.shift, kernel.astype(inputs.gram.dtype), asymmetry
    )


def least_damping(tokens: int, inputs: int) -> int:
    """Returns the factor of the damping for an expert: a power of 2, from 1 to 1000.

    It is 1 with at least as many tokens as inputs, else about the ratio of inputs to tokens.
    """
    return min(DAMPING[-1], 2 ** math.ceil(math.log2(max(1.0, inputs / max(1, tokens)))))
