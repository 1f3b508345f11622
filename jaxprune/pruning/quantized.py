"""Pruned layers brought to a grid, in a loop of their own: hidden states go through the layers as
they are on it."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.quantization import has_grid
from jaxprune.models import Layer
from jaxprune.pruning.calibration_states import CalibrationStates
from jaxprune.pruning.kernel import KernelResult
from jaxprune.pruning.layer import Solver
from jaxprune.pruning.loop import solve_layer
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.rules import Target
from jaxprune.pruning.store import Stage
from jaxprune.sparsity.masks import StoredMask, unpack
from jaxprune.sparsity.patterns import Unstructured
from jaxprune.streaming.model import StreamedModel, inside_layer

ERROR = "quantization_error"
"""The metric that says what a kernel's outputs lost on the way to the grid, as `KernelResult.error`
says of pruning."""


def quantize_layers(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    pruned: Callable[[int], LayerResult],
    quantization: str,
    saved: Stage[LayerResult],
) -> Iterator[LayerResult]:
    """Brings layers to a grid, one after another: their zeros stay, also those of linear layers
    that are dense.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        pruned: the index of a layer -> it, pruned.
        quantization: the type, of `methods.quantization.BITS`.
        saved: where layers are saved as soon as they are done, and taken from where they are saved
            already.

    Yields:
        The layers; kernels that come in no whole blocks are as they were. Zeros are counted again,
        `ERROR` is among the metrics, and the seconds are those spent here.
    """
    states = CalibrationStates(model, tokens, with_dense=False)
    for index, part in enumerate(model.architecture.layers):
        if found := saved.get(index):
            yield found
            continue
        layer = pruned(index)
        states.catch_up(index, saved)
        solver = Solver(Magnitude(), partial(_target, part, layer.masks), quantization=quantization)
        stored = part.stack(inside_layer(index, layer.params))
        solved = solve_layer(model, index, stored, states, solver, {})
        kernels = dict(layer.kernels)
        for path in kernels.keys() & solved.masks.keys():
            kernels[path] = _merged(kernels[path], solved.kernels[path])
        seconds = {"quantize": sum(solved.seconds.values())}
        result = dataclasses.replace(
            layer, params=solved.params, kernels=kernels, seconds=seconds, resumed=False
        )
        saved.put(index, result)
        states.passed(index, saved)
        yield result


def _target(part: Layer, masks: Params, _: int, path: str) -> Target:
    """Returns the mask of a pruned kernel, under which it is brought to a grid; None: it stays as
    it is."""
    inputs, outputs = part.kernels[path]
    if path in part.routers or not has_grid(inputs):
        return None
    packed = masks.get(path)
    return (
        Unstructured(0)
        if packed is None
        else StoredMask((inputs, outputs), lambda: unpack(packed, inputs))
    )


def _merged(pruned: KernelResult, quantized: KernelResult) -> KernelResult:
    metrics = pruned.metrics | {ERROR: quantized.error}
    return pruned._replace(zeros=quantized.zeros, sections=quantized.sections, metrics=metrics)
