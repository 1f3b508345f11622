"""Quantizes pruned layers in a sweep of its own, with the activations of quantized layers."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from convert import Params
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.quantization import has_grid
from jaxprune.models import Layer
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.kernel import KernelResult
from jaxprune.solve.layer import Solver, solve_layer
from jaxprune.solve.layer_result import LayerResult, LayerSummary
from jaxprune.solve.rules import Target
from jaxprune.sparsity.masks import StoredMask, unpack
from jaxprune.sparsity.patterns import Unstructured
from jaxprune.streaming.model import inside_layer
from jaxprune.streaming.sweep import sweep

ERROR = "quantization_error"
"""The metric of a kernel's relative output error from quantization; `KernelResult.error` is that
from pruning."""


def quantize_layers(
    states: CalibrationStates, pruned: Callable[[int], LayerResult], quantization: str
) -> Iterator[LayerResult]:
    """Quantizes layers one after another; all zeros stay, also those of dense linear layers.

    Args:
        states: the dense model, its states before the first layer, and where layers are saved.
        pruned: index of a layer -> pruned layer.
        quantization: the type, of `methods.quantization.BITS`.

    Returns:
        The layers. Kernels whose inputs do not form whole blocks are unchanged. Zeros are counted
        again, metrics include `ERROR`, and seconds are those of the quantization.
    """
    model = states.model

    def visit(index: int, layer: LayerResult, _: dict[str, float]) -> LayerResult:
        part = model.architecture.layers[index]
        solver = Solver(Magnitude(), partial(_target, part, layer.masks), quantization=quantization)
        stored = part.stack(inside_layer(index, layer.params))
        solved = solve_layer(states, solver, index, stored, {})
        kernels = dict(layer.kernels)
        for path in kernels.keys() & solved.masks.keys():
            kernels[path] = _merged(kernels[path], solved.kernels[path])
        seconds = {"quantize": sum(solved.figures.seconds.values())}
        return LayerResult(LayerSummary(index, seconds, kernels), solved.params, layer.masks)

    def source(indices: Sequence[int]) -> Iterator[LayerResult]:
        return map(pruned, indices)

    return sweep(range(model.num_layers), source, visit, saved=states.saved, states=states)


def _target(part: Layer, masks: Params, _: int, path: str) -> Target:
    """Returns the mask under which a kernel is quantized; None: it is not quantized."""
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
    stats = pruned.stats | {ERROR: quantized.error}
    return dataclasses.replace(
        pruned, zeros=quantized.zeros, projections=quantized.projections, stats=stats
    )
