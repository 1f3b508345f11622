"""What of a tuning stays on the device, by what fits beside it."""

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
    """What stays on the device.

    Attributes:
        state: whether the kernels do; else they stay on the host.
        results: whether a step's intermediate results do; else each layer's forward pass is run
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
    """Returns what fits a device, beside what a layer takes while it is visited, and while a batch
    goes through the dense model.

    Args:
        architecture: of the model whose kernels are tuned.
        window: windows of a step, and their length.
        devices: how many the kernels are spread over.
        late_zeros: whether a layer's kernels are there without what is masked, too.
        teacher: of the dense model; None: the same.
        device_bytes: the memory of a device; None: what this machine's has, a CPU all that the host
            has.
        batch_tokens: tokens of such a batch on each device; None: as this machine's takes them.
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
    """Bytes of a step of a tuning.

    Attributes:
        state: all kernels, with their masks.
        largest: those of one layer, at most.
        results: the intermediate results of all layers.
        visit: what a layer takes in its backward pass, at most, beside its kernels.
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
            # gradients are as large
            visit = max(visit, 2 * kept + (1 + late_zeros) * weights * dtype.itemsize)
        return cls(state, largest, results, visit)


def _batch(architecture: Architecture, tokens: int) -> int:
    """Returns the bytes of a layer of most weights, and of a batch on its way through the widest
    one: hidden states before and after, gate, up and their product."""
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
