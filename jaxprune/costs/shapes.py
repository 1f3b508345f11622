"""The shapes with which the programs of a run are called."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from jax import ShapeDtypeStruct as Shape
from jaxtyping import DTypeLike

from jaxprune import hardware
from jaxprune.costs.program import Program, size_of
from jaxprune.models import Architecture, Layer
from jaxprune.sharding import Devices
from jaxprune.streaming.hidden_states import batch_size
from jaxprune.streaming.model import apply_layer


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the programs of a run are called with.

    Attributes:
        architecture: the architecture of the model.
        stored: dtype of the checkpoint's params.
        devices: the devices that they run on.
        tokens: the number of tokens on a device at a time; None: as the run takes them.
        device_bytes: the memory of a device; None: what this machine's has.
    """

    architecture: Architecture
    stored: DTypeLike
    devices: Devices
    tokens: int | None = None
    device_bytes: float | None = None

    @property
    def layers(self) -> Mapping[Layer, int]:
        """The kinds of layers -> how many there are of each."""
        return Counter(self.architecture.layers)

    def params(self, spec: Mapping[str, Any], dtype: DTypeLike | None = None) -> dict[str, Shape]:
        """Returns replicated params; None: in the dtype of the computation."""
        dtype = dtype or self.architecture.config.dtype
        return {
            path: self.devices.abstract(Shape(param.shape, dtype), None)
            for path, param in spec.items()
        }

    def layer_params(self, layer: Layer) -> dict[str, Shape]:
        """Returns a layer's params, experts sharded."""
        params = {}
        for path, param in layer.spec.items():
            axis = 0 if path.rpartition(".")[0] in layer.experts else None
            params[path] = self.devices.abstract(Shape(param.shape, self.stored), axis)
        return params

    def states(self, windows: int, length: int) -> Shape:
        """Returns hidden states of so many windows."""
        shape = windows, length, self.architecture.width
        return self.devices.abstract(Shape(shape, self.architecture.config.dtype), 0)

    def batch(self, windows: int, length: int, tokens: int | None = None) -> Shape:
        """Returns the hidden states of one step over so many windows."""
        count = self.devices.count
        size = batch_size(windows, length, tokens or self.tokens, count)
        return self.states(size * count, length)

    def rows(self, count: int) -> Shape:
        """Returns the hidden states of so many tokens, as the head takes them."""
        return Shape((count, self.architecture.width), self.architecture.config.dtype)

    def forward(
        self, phase: str, layer: Layer, x: Shape, windows: float, *, resident: int = 0
    ) -> Program:
        """Returns the forward pass of a layer, of which one batch is on its way in, and one on its
        way out.

        Args:
            phase: the phase that it belongs to.
            layer: the kind of layer.
            x: the hidden states of a batch.
            windows: that pass through layers of this kind in all.
            resident: bytes on the device besides.
        """
        arguments, calls = (self.layer_params(layer), x, None), windows / x.shape[0]
        function = partial(apply_layer, layer)
        return Program(phase, "forward", function, arguments, calls, 2 * size_of(x) + resident)


def calibration_tokens(architecture: Architecture, tokens: int | None = None) -> int | None:
    """Returns how many tokens of calibration windows are on a device at a time.

    Where every token passes every expert, there are as many rows as where each takes a few.

    Args:
        architecture: the architecture of the model.
        tokens: as many where it does not; None: what suits the device.
    """
    routing = architecture.config.routing
    if routing is None or not routing.route_all:
        return tokens
    most = tokens or hardware.current().tokens_per_batch
    return max(1, most * routing.per_token // routing.experts)
