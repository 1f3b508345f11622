"""Decides which arrays of a tuning stay on the device, by its memory."""

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import hardware
from jaxprune.distill import adafactor
from jaxprune.distill.layer_vjp import forward_and_vjp
from jaxprune.models import Architecture
from jaxprune.streaming.head import CHUNK


class Placement(NamedTuple):
    """What stays on the device between layers.

    Attributes:
        state: whether the kernels and their state stay on the device, not on the host.
        results: whether a step's intermediate results stay; else each layer's forward pass runs
            again before its vjp.
    """

    state: bool
    results: bool


def placement_of(
    architecture: Architecture,
    window: tuple[int, int],
    devices: int = 1,
    *,
    late_zeros: bool = False,
    teacher: Architecture | None = None,
    device_bytes: float | None = None,
    batch_tokens: int | None = None,
) -> Placement:
    """Returns what fits a device during a tuning step and during the dense model's forward pass.

    Args:
        architecture: the architecture of the tuned model.
        window: (windows of a step, tokens of a window).
        devices: the number of devices over which the kernels are sharded.
        late_zeros: whether gradual pruning needs a second copy of a layer's kernels, with masked
            weights zeroed.
        teacher: the architecture of the dense model; None: `architecture`.
        device_bytes: the memory of a device; None: that of this machine's device, which for a CPU
            is the host's memory.
        batch_tokens: tokens of a batch of the dense model on each device; None: the device's
            default.
    """
    windows = window[0] if window[0] % devices else window[0] // devices
    step = _Step.of(architecture, windows, window[1], late_zeros)
    if device_bytes is None and hardware.current().on_cpu:
        return Placement(True, step.results < hardware.cpu_budget())
    outer = sum(
        shape.size
        for part in (architecture.embed, architecture.head)
        for shape in part.spec.values()
    )
    logits = 6 * 4 * CHUNK // 2 * architecture.config.vocab_size
    memory = hardware.device_memory() or 0 if device_bytes is None else device_bytes
    free = hardware.HEADROOM * memory - outer * np.dtype(architecture.config.dtype).itemsize
    batch = _batch(teacher or architecture, batch_tokens or hardware.current().tokens_per_batch)
    room = free - step.visit - logits
    state = step.state / devices < min(room, free - batch)
    return Placement(
        state, step.results < room - (step.state if state else 3 * step.largest) / devices
    )


class _Step(NamedTuple):
    """Memory of a tuning step, in bytes.

    Attributes:
        state: all kernels, with their masks.
        largest: the largest layer's kernels, with their masks.
        results: the intermediate results of all layers.
        visit: the most that a layer's backward pass takes, beside its kernels.
    """

    state: int
    largest: int
    results: int
    visit: int

    @classmethod
    def of(cls, architecture: Architecture, windows: int, length: int, late_zeros: bool) -> "_Step":
        dtype = np.dtype(architecture.config.dtype)
        x = jax.ShapeDtypeStruct((windows, length, architecture.width), dtype)
        state = largest = results = visit = 0
        for layer, count in Counter(architecture.layers).items():
            kernels = adafactor.shapes(layer, dtype)
            rest = {name: shape for name, shape in layer.spec.items() if name not in kernels.values}
            kept = _bytes(
                jax.eval_shape(partial(forward_and_vjp, layer), kernels.values, rest, x)[1]
            )
            own, weights = _bytes(kernels), sum(value.size for value in kernels.values.values())
            state, results, largest = state + count * own, results + count * kept, max(largest, own)
            # Gradients are as large as the results.
            visit = max(visit, 2 * kept + (1 + late_zeros) * weights * dtype.itemsize)
        return cls(state, largest, results, visit)


def _batch(architecture: Architecture, tokens: int) -> int:
    """Returns the bytes of the dense model's forward pass: a layer and a batch.

    They are the weights of the largest layer, and the widest layer's activations: hidden states
    before and after, gate, up and their product.
    """
    routing = architecture.config.routing
    weights = widest = 0
    for layer in set(architecture.layers):
        weights = max(weights, sum(shape.size for shape in layer.spec.values()))
        for path, shape in layer.linears.items():
            widest = max(
                widest, max(shape) * (routing.per_token if routing and path in layer.experts else 1)
            )
    return (weights + tokens * (2 * architecture.width + 3 * widest)) * np.dtype(
        architecture.config.dtype
    ).itemsize


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
