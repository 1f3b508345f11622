"""What a run is asked to do, and what it needs."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert import Spec
from jaxprune import hardware
from jaxprune.calibration.text_stream import windows_held_out
from jaxprune.distill import adafactor
from jaxprune.distill.placement import Placement, placement_of
from jaxprune.distill.schedule import TuningSteps
from jaxprune.hardware import Hardware
from jaxprune.models import Architecture, stored_dtype
from jaxprune.planning.program import Flops
from jaxprune.planning.targets import Target
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import effective_tuning
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.solve.expert_removal import without_experts

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run is asked to do.

    Attributes:
        spec: the shapes and dtypes of the dense checkpoint.
        saved: the same for the result, before experts are dropped.
        architecture: the architecture of the model.
        recipe: what is done to it.
        windows: the number of calibration windows.
        length: tokens of a calibration window.
        texts: windows and tokens of a window of each text that is evaluated.
        out: the folder that the run makes.
        scratch: the folder of hidden states; None: they are in host memory.
        devices: the devices that it runs on.
        device_bytes: the bytes of a device, instead of what this machine's device has: to plan for
            another one.
        target: the hardware to plan for; None: this machine's, or any other of so much memory.
    """

    spec: Spec
    saved: Spec
    architecture: Architecture
    recipe: Recipe
    windows: int
    length: int
    texts: Sequence[tuple[int, int]]
    out: Path
    scratch: Path | None = None
    devices: Devices = ONE_DEVICE
    device_bytes: float | None = None
    target: Target | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return hardware.current().on_cpu and self.device_bytes is None

    @property
    def batch_tokens(self) -> int | None:
        """Tokens on a device at a time; None: as this machine's takes them."""
        return Hardware("gpu").tokens_per_batch if self.device_bytes else None

    @functools.cached_property
    def placement(self) -> Placement:
        """What of a distillation stays on the devices."""
        return placement_of(
            without_experts(self.architecture, self.recipe.experts.drop_experts),
            self.steps.shape,
            self.devices.count,
            late_zeros=bool(self.steps.prunings),
            teacher=self.architecture,
            device_bytes=self.device_bytes,
            batch_tokens=self.batch_tokens,
        )

    def states_bytes(self, windows: int, length: int) -> int:
        """Returns the bytes of hidden states."""
        return windows * length * self.architecture.state_bytes

    def stored_bytes(self, below: str = "") -> int:
        """Returns the bytes of the result's params whose paths begin so, as they are stored."""
        return _bytes_of(self.saved, below)

    def dense_bytes(self, below: str = "") -> int:
        """Returns the bytes of the dense checkpoint's params whose paths begin so, as they are
        read."""
        return _bytes_of(self.spec, below)

    @property
    def held_out(self) -> int:
        """Windows that the distillation does not see."""
        return windows_held_out(self.length) if self.recipe.tuning.tune_tokens else 0

    @functools.cached_property
    def steps(self) -> TuningSteps:
        """The steps of the distillation."""
        tuning = effective_tuning(self.recipe.tuning, self.recipe.pattern)
        return TuningSteps.of(tuning, self.windows, self.length, self.held_out * self.length)

    @property
    def dense_groups(self) -> list[int]:
        """Of how many of its windows the dense model's hidden states are computed together, group
        by group."""
        return self.steps.groups(self.architecture.state_bytes, self.batch_tokens)

    @property
    def tuned_bytes(self) -> int:
        """Bytes of all kernels that are pruned, while they are tuned."""
        return (
            adafactor.weight_dtype(np.dtype(self.architecture.config.dtype)).itemsize
            * self.pruned_weights
        )

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


class Cost(NamedTuple):
    """What a program costs on a target.

    Attributes:
        phase, name, calls: of the program.
        seconds: the least time of a call.
        bound: the least time of any program of the same products, arguments and results.
        compilation: seconds that its compilation took here.
        instructions: of the compiled program.
    """

    phase: str
    name: str
    calls: float
    seconds: float
    bound: float
    compilation: float
    instructions: int


@dataclasses.dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        device: phase -> bytes on the device at most; on a CPU that is host memory too.
        host: phase -> bytes in host memory besides.
        disk: what -> bytes on the output's disk at most, until the run ends.
        scratch: phase -> bytes of hidden states, in host memory or in the scratch folder.
        kept: bytes on that disk afterwards.
        flops: phase -> FLOPs by dtype.
        transfers: phase -> bytes between host and device, each way counted.
        traffic: phase -> bytes that programs move on the device; none where that is not known.
        exchanged: phase -> bytes that programs send from a device to others; none where that is not
            known.
        seconds: phase -> the least time of its programs and transfers on a target, at full rates.
        costs: of each program, where a target's compiler has compiled it.
    """

    device: dict[str, int]
    host: dict[str, float]
    disk: dict[str, int]
    scratch: dict[str, float]
    kept: int
    flops: dict[str, Flops]
    transfers: dict[str, float] = dataclasses.field(default_factory=dict)
    traffic: dict[str, float] = dataclasses.field(default_factory=dict)
    exchanged: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
