"""What a run needs, before it begins: device memory by phase, host memory, disk, FLOPs, time.

Shapes are enough: config.json and the headers of the weights, or config.json alone. Device memory is the compiler's own
analysis of the programs that the run will call, or, where even all their intermediate results fit at once, that sum.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import Spec, formats, part_of
from convert.assets import read_config
from convert.hub import resolve
from jaxprune.models import Architecture, architecture_of, stored_dtype
from jaxprune.planning import machine, programs
from jaxprune.planning.machine import peak_bytes
from jaxprune.planning.program import Flops, Program, Shapes
from jaxprune.pruning.experts import without_experts
from jaxprune.pruning.sensitivity import HOST_BYTES
from jaxprune.recipe import Recipe
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.sparsity.patterns import Unstructured
from jaxprune.streaming.hidden_states import TOKENS_PER_BATCH, tokens_per_batch

GIB = 2**30
SHARE_OF_RATE = {"sensitivity": 0.6, "tune": 0.7, "evaluate": 0.5}
"""Share of the matrix rate that a phase reaches; 0.75 where not named. From docs/performance.md."""
LIBRARIES = 1.25 * GIB
"""Host memory of Python, JAX, transformers, datasets, Orbax and compiled programs, once a text is prepared."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run is asked to do.

    Attributes:
        spec: the shapes and dtypes of the dense checkpoint.
        architecture: the architecture of the model.
        recipe: what is done to it.
        windows: the number of calibration windows.
        length: tokens of a calibration window.
        evaluation: windows and tokens of a window of the text that is evaluated; None: there is none.
        out: the folder that the run makes.
        scratch: the folder of hidden states; None: they are in host memory.
        devices: the devices that it runs on.
        device_bytes: the bytes of a device, instead of what this machine's device has: to plan for another one.
    """

    spec: Spec
    architecture: Architecture
    recipe: Recipe
    windows: int
    length: int
    evaluation: tuple[int, int] | None
    out: Path
    scratch: Path | None = None
    devices: Devices = ONE_DEVICE
    device_bytes: float | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return jax.default_backend() == "cpu" and self.device_bytes is None

    def states_bytes(self, windows: int, length: int) -> int:
        """Returns the bytes of hidden states."""
        return windows * length * self.architecture.width * np.dtype(self.architecture.config.dtype).itemsize

    @property
    def pruned_weights(self) -> int:
        """Weights of all kernels that are pruned."""
        return sum(n * m for n, m in self.architecture.kernel_shapes().values())


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
    """

    device: dict[str, int]
    host: dict[str, float]
    disk: dict[str, int]
    scratch: dict[str, float]
    kept: int
    flops: dict[str, Flops]


def shapes_of(ckpt: str, dtype: np.dtype | None) -> tuple[Spec, Architecture]:
    """Returns a checkpoint's params and architecture, from headers, or from config.json where there is nothing else.

    Args:
        ckpt: its name, as for `convert.open_checkpoint`.
        dtype: the dtype of the computation; None: as in `StreamedModel`.

    Raises:
        InputError, CheckpointError: there is not even that.
    """
    path = resolve(ckpt, weights=False)
    for module in formats().values():
        if hasattr(module, "Reader") and module.Reader.accepts(path):
            reader = module.Reader(path)
            return reader.spec, architecture_of(reader.assets, dtype, reader.spec)
    written = read_config(path)
    stored = np.dtype(written.get("dtype") or written.get("torch_dtype") or "float16")
    architecture = architecture_of(path, dtype or stored)
    return {path: jax.ShapeDtypeStruct(t.shape, stored) for path, t in architecture.spec.items()}, architecture


def need(work: Work, within: float = 0.0) -> Need:
    """Counts what a run needs.

    Args:
        work: the work of the run.
        within: bytes of a device that are there for sure: a program whose every intermediate result would fit at once
            is not compiled to know better.
    """
    spread, phases = _spread(work), dict[str, list[Program]]()
    for program in programs_of(spread):
        phases.setdefault(program.phase, []).append(program)
    flops: dict[str, Flops] = {phase: Flops() for phase in phases}
    every = [program for ones in phases.values() for program in ones]
    for program in every if spread is work else programs_of(work):  # on one device loops have a length that is known
        flops[program.phase].update({dtype: int(n * program.calls) for dtype, n in program.flops().items()})
    device = {phase: max(_peaks(ones, within)) for phase, ones in phases.items()}
    disk, states, host = _disk(work), _states(work, phases), _host(work, phases)
    if work.scratch is None:
        host = {phase: size + states[phase] for phase, size in host.items()}
    return Need(device, host, disk, states, disk["the checkpoint"], flops)


def _spread(work: Work) -> Work:
    """Returns the work with experts spread over its devices."""
    architecture, mesh = work.architecture, work.devices.mesh
    if architecture.config.routing is None or architecture.config.routing.mesh == mesh:
        return work
    return dataclasses.replace(work, architecture=architecture.routed(mesh=mesh))


def need_of_evaluation(
    spec: Spec, architecture: Architecture, texts: Iterable[tuple[int, int]], checkpoints: int
) -> Need:
    """Counts the FLOPs of an evaluation; what it needs besides is left out.

    Args:
        spec: of one of the checkpoints.
        architecture: of theirs.
        texts: windows and tokens of a window of each text.
        checkpoints: how many are measured.
    """
    shapes, flops = Shapes(architecture, stored_dtype(spec), ONE_DEVICE), Flops()
    for windows, length in texts:
        for program in programs.of_evaluation(shapes, windows, length):  # of two checkpoints
            calls = program.calls * checkpoints / 2
            flops.update({dtype: int(count * calls) for dtype, count in program.flops().items()})
    return Need({}, {}, {}, {}, 0, {"evaluate": flops})


def programs_of(work: Work) -> Iterator[Program]:
    """Yields the programs of a run."""
    tokens = TOKENS_PER_BATCH["gpu"] if work.device_bytes and jax.default_backend() == "cpu" else None
    shapes = Shapes(work.architecture, stored_dtype(work.spec), work.devices, tokens, work.device_bytes)
    recipe = work.recipe
    pattern = recipe.pattern or Unstructured(0.5)  # a given mask takes no more than selecting one
    if share := recipe.experts.drop_experts:
        yield from programs.of_experts(shapes, work.windows, work.length)
        shapes = dataclasses.replace(shapes, architecture=without_experts(work.architecture, share))
    if recipe.importance.measured:
        yield from programs.of_sensitivity(shapes, recipe.importance.windows_of(work.windows), work.length)
    yield from programs.of_pruning(_routing_all(shapes, recipe), work.windows, work.length, recipe.method, pattern)
    if epochs := recipe.tuning.tune_epochs:
        yield from programs.of_distillation(shapes, work.windows, work.length, epochs, keep=_keeps(work))
    if work.evaluation:
        yield from programs.of_evaluation(shapes, *work.evaluation)


def _routing_all(shapes: Shapes, recipe: Recipe) -> Shapes:
    """Returns the shapes of the loop over layers, in which every token may pass every expert, fewer at a time."""
    routing = shapes.architecture.config.routing
    if routing is None or not recipe.experts.route_all:
        return shapes
    tokens = max(1, (shapes.tokens or tokens_per_batch()) * routing.per_token // routing.experts)
    return dataclasses.replace(shapes, architecture=shapes.architecture.routed(route_all=True), tokens=tokens)


def _keeps(work: Work) -> bool:
    """Returns whether all that a distillation needs stays on the device, as far as can be told without one."""
    return jax.default_backend() == "cpu" and 12 * work.pruned_weights < 4e9


def _peaks(phase: list[Program], within: float) -> Iterator[int]:
    """Yields the peaks of the programs, or more."""
    for program in phase:
        most = program.most_bytes()
        yield most if most < within else program.peak_bytes()


def _host(work: Work, phases: Mapping[str, Any]) -> dict[str, float]:
    """Returns phase -> host memory besides what the device needs and the hidden states."""
    sizes = Counter[str]()
    for path in work.spec:
        sizes[part_of(path)] += _size(work.spec, path)
    layer = max(size for part, size in sizes.items() if part.startswith("layers."))
    # One layer being pruned, one read ahead, one as it goes out, one being committed, and that one's copy; experts are
    # stacked, which copies them as they come in.
    copies = 7 if any(layer.experts for layer in work.architecture.layers) else 5
    found = dict.fromkeys(phases, max(peak_bytes()["host"], LIBRARIES) + copies * layer)
    if "sensitivity" in phases:
        some = work.recipe.importance.windows_of(work.windows)
        energies = 4 * sum(len(layer.reads) for layer in work.architecture.layers) * some * work.length
        found["sensitivity"] += energies
        for phase in ("gram", "solve", "forward"):
            found[phase] += 2 * energies * work.recipe.importance.weighs
    if "tune" in phases:
        found["tune"] += sum(_size(work.spec, path) for path in work.spec) + work.pruned_weights // 8
        if not _keeps(work):
            found["tune"] += 12 * work.pruned_weights
    return found


def _states(work: Work, phases: Mapping[str, Any]) -> dict[str, float]:
    """Returns phase -> bytes of the hidden states that there are at a time."""
    hidden = work.states_bytes(work.windows, work.length)
    found: dict[str, float] = dict.fromkeys(phases, hidden * (2 if work.recipe.asymmetry else 1))
    if "tune" in phases:
        found["tune"] = hidden
    if "sensitivity" in phases:
        some = work.states_bytes(work.recipe.importance.windows_of(work.windows), work.length)
        inputs = (len(work.architecture.layers) + 1) * some
        found["sensitivity"] = 2 * some + (inputs if work.scratch else min(HOST_BYTES, inputs))
    if work.evaluation:
        found["evaluate"] = 2 * work.states_bytes(*work.evaluation)
    return found


def _disk(work: Work) -> dict[str, int]:
    """Returns what -> bytes on the output's disk."""
    whole = sum(_size(work.spec, path) for path in work.spec)
    layers = sum(_size(work.spec, path) for path in work.spec if path.startswith("layers."))
    tuned = work.recipe.tuning.tune_epochs > 0
    hidden = work.states_bytes(work.windows, work.length)
    return {
        "the checkpoint": whole,
        "layers that are finished": (layers + work.pruned_weights // 8) * (1 + tuned),
        "hidden states": 2 * hidden * (2 if work.recipe.asymmetry else 1),
        "tuning": 2 * 12 * work.pruned_weights * tuned,
    }


def _size(spec: Spec, path: str) -> int:
    return spec[path].size * spec[path].dtype.itemsize


def seconds(need: Need, devices: Devices = ONE_DEVICE) -> dict[str, float]:
    """Predicts how long each phase takes, from the matrix rate of this machine, measured now."""
    dtypes = sorted({dtype for flops in need.flops.values() for dtype in flops})
    rates = {dtype: machine.matrix_rate(dtype) for dtype in dtypes}
    return {
        phase: sum(count / rates[dtype] for dtype, count in flops.items())
        / devices.count
        / SHARE_OF_RATE.get(phase, 0.75)
        for phase, flops in need.flops.items()
    }
