"""Decides which arrays of a tuning stay on the device, by its memory."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import hardware
from jaxprune.costs.program import size_of
from jaxprune.distill import adafactor
from jaxprune.distill.layer_vjp import forward_and_vjp
from jaxprune.models import Architecture, Layer
from jaxprune.sharding import ONE_DEVICE, Devices
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
    gradual: bool = False,
    teacher: Architecture | None = None,
    device_bytes: float | None = None,
    batch_tokens: int | None = None,
) -> Placement:
    """Returns what fits a device during a tuning step and during the dense model's forward pass.

    Args:
        architecture: the architecture of the tuned model.
        window: (windows of a step, tokens of a window).
        devices: the number of devices over which the kernels are sharded.
        gradual: whether gradual pruning needs a second copy of a layer's kernels, with masked
            weights zeroed.
        teacher: the architecture of the dense model; None: `architecture`.
        device_bytes: the memory of a device; None: that of this machine's device, which for a CPU
            is the host's memory.
        batch_tokens: tokens of a batch of the dense model on each device; None: the device's
            default.
    """
    windows = window[0] if window[0] % devices else window[0] // devices
    step = _Step.of(architecture, windows, window[1], gradual)
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


class TunedLayer(NamedTuple):
    """The shapes with which a layer is called in a tuning.

    Attributes:
        kernels: of its pruned linear layers.
        rest: its other params.
        vjp: what its forward pass keeps for its backward pass.
    """

    kernels: adafactor.Kernels
    rest: dict[str, Any]
    vjp: Any

    @classmethod
    def of(
        cls, layer: Layer, params: Mapping[str, Any], x: Any, devices: Devices = ONE_DEVICE
    ) -> "TunedLayer":
        """Returns the shapes of a layer that has such params and such an input."""
        kernels = jax.tree.map(
            lambda leaf: devices.abstract(leaf, -1), adafactor.shapes(layer, np.dtype(x.dtype))
        )
        rest = {name: param for name, param in params.items() if name not in kernels.moving}
        vjp = jax.eval_shape(partial(forward_and_vjp, layer), kernels.values, rest, x)[1]

        def placed(leaf: Any) -> Any:
            return devices.abstract(leaf, 0 if leaf.shape[:1] == x.shape[:1] else None)

        return cls(kernels, rest, jax.tree.map(placed, vjp))


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
    def of(cls, architecture: Architecture, windows: int, length: int, gradual: bool) -> "_Step":
        dtype = np.dtype(architecture.config.dtype)
        x = jax.ShapeDtypeStruct((windows, length, architecture.width), dtype)
        state = largest = results = visit = 0
        for layer, count in Counter(architecture.layers).items():
            tuned = TunedLayer.of(layer, layer.spec, x)
            kernels, kept = tuned.kernels, size_of(tuned.vjp)
            own, weights = size_of(kernels), sum(value.size for value in kernels.values.values())
            state, results, largest = state + count * own, results + count * kept, max(largest, own)
            # Gradients are as large as the results.
            visit = max(visit, 2 * kept + (1 + gradual) * weights * dtype.itemsize)
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
