"""All that decides what a run costs: the sizes of model, text and devices, and the recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert import Spec
from jaxprune import hardware
from jaxprune.costs.shapes import Shapes, calibration_tokens
from jaxprune.hardware import Hardware
from jaxprune.models import Architecture, stored_dtype
from jaxprune.recipe import Recipe
from jaxprune.sharding import ONE_DEVICE, Devices


class Removal(NamedTuple):
    """The removal of one kind of parts.

    Attributes:
        kind: layers, experts, heads or channels.
        before: the architecture before it.
        after: the architecture after it.
        changes: entries of config.json that the smaller model has other values of, those of
            earlier removals included.
        groups: how many parts each layer has before and after; None: they differ by layer, and
            every input of a linear layer is one.
    """

    kind: str
    before: Architecture
    after: Architecture
    changes: Mapping[str, Any]
    groups: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """What a run is asked to do, in sizes.

    Attributes:
        spec: the shapes and dtypes of the dense checkpoint.
        saved: the same for the result, before any removal.
        architecture: the architecture of the dense model.
        removals: the parts that are removed before pruning, in order.
        recipe: what is done to it.
        windows: the number of calibration windows.
        length: tokens of a calibration window.
        texts: windows and tokens of a window of each text that is evaluated.
        out: the folder that the run makes.
        scratch: the folder of hidden states; None: they are in host memory.
        devices: the devices that it runs on.
        device_bytes: the bytes of a device, instead of what this machine's device has: to plan for
            another one.
    """

    spec: Spec
    saved: Spec
    architecture: Architecture
    removals: Sequence[Removal]
    recipe: Recipe
    windows: int
    length: int
    texts: Sequence[tuple[int, int]]
    out: Path
    scratch: Path | None = None
    devices: Devices = ONE_DEVICE
    device_bytes: float | None = None

    @property
    def left(self) -> Architecture:
        """The architecture after all removals."""
        return self.removals[-1].after if self.removals else self.architecture

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return hardware.current().on_cpu and self.device_bytes is None

    @property
    def batch_tokens(self) -> int | None:
        """Tokens on a device at a time; None: as this machine's takes them."""
        return Hardware("gpu").tokens_per_batch if self.device_bytes else None

    @property
    def dense(self) -> Shapes:
        """The shapes of the dense model's programs."""
        return self._shapes(self.architecture, self.spec)

    @property
    def pruned(self) -> Shapes:
        """The shapes of the pruned model's programs."""
        return self._shapes(self.left, self.saved)

    @property
    def solved(self) -> Shapes:
        """The shapes of the loops over layers, in which every token may pass every expert."""
        shapes = self.pruned
        if not self.recipe.route_all:
            return shapes
        architecture = self.left.routed(route_all=True)
        tokens = calibration_tokens(architecture, shapes.tokens)
        return dataclasses.replace(shapes, architecture=architecture, tokens=tokens)

    def removal_of(self, kind: str) -> Removal:
        """Returns the removal of one kind of parts, which is among them."""
        return next(removal for removal in self.removals if removal.kind == kind)

    def shapes_of(self, architecture: Architecture) -> Shapes:
        """Returns the shapes of the programs of another architecture, stored as the result."""
        return self._shapes(architecture, self.saved)

    def _shapes(self, architecture: Architecture, spec: Spec) -> Shapes:
        stored = stored_dtype(spec)
        return Shapes(architecture, stored, self.devices, self.batch_tokens, self.device_bytes)

    def spread(self) -> "RunSizes":
        """Returns the run with experts spread over its devices."""
        routing, mesh = self.architecture.config.routing, self.devices.mesh
        if routing is None or routing.mesh == mesh:
            return self
        removals = [
            one._replace(before=one.before.routed(mesh=mesh), after=one.after.routed(mesh=mesh))
            for one in self.removals
        ]
        architecture = self.architecture.routed(mesh=mesh)
        return dataclasses.replace(self, architecture=architecture, removals=removals)

    @property
    def sensitivity_windows(self) -> int:
        """The number of calibration windows that sensitivities are measured on."""
        return self.recipe.importance.windows_of(self.windows)

    def states_bytes(self, windows: int, length: int | None = None) -> int:
        """Returns the bytes of hidden states; None: of calibration windows."""
        return windows * (length or self.length) * self.architecture.state_bytes

    def stored_bytes(self, below: str = "") -> int:
        """Returns the bytes of the result's params whose paths begin so, as they are stored."""
        return _bytes_of(self.saved, below)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense model's layers, as they are read."""
        return _bytes_of(self.spec, "layers.")

    @property
    def pruned_bytes(self) -> int:
        """Bytes of all kernels that are pruned, as they are stored."""
        return stored_dtype(self.saved).itemsize * self.pruned_weights

    @property
    def mask_bytes(self) -> int:
        """Bytes of all masks, a bit a weight."""
        return self.pruned_weights // 8

    @property
    def pruned_weights(self) -> int:
        """Weights of all kernels that are pruned."""
        return sum(n * m for n, m in self.architecture.kernel_shapes().values())


def _bytes_of(spec: Spec, below: str) -> int:
    return sum(p.size * p.dtype.itemsize for path, p in spec.items() if path.startswith(below))
