"""What a run needs, before it begins: device memory by phase, host memory, disk, FLOPs, time.

Shapes are enough: config.json and the headers of the weights, or config.json alone. Device memory
is the compiler's own analysis of the programs that the run will call, or, where even all their
intermediate results fit at once, that sum.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import DTypeLike

from convert import Spec, formats, part_of
from convert.assets import read_config
from convert.casting import cast_spec, saving_dtype
from convert.hub import resolve
from jaxprune import hardware
from jaxprune.hardware import writing_for
from jaxprune.models import Architecture, architecture_of, stored_dtype
from jaxprune.planning import hlo, machine, programs
from jaxprune.planning.machine import peak_bytes
from jaxprune.planning.program import Flops, Program, Shapes, outside_bytes
from jaxprune.planning.transfers import transfers
from jaxprune.planning.work import GIB, Cost, Need, Work
from jaxprune.recipe import Recipe
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.solve.expert_removal import without_experts
from jaxprune.solve.sensitivity import HOST_BYTES
from jaxprune.sparsity.patterns import Given, Pattern, Unstructured

SHARE_OF_RATE = {"sensitivity": 0.6, "tune": 0.7, "evaluate": 0.5}
"""Share of the matrix rate that the float32 products of a phase reach; 0.75 where not named. These
are of a CPU, from docs/performance.md."""
SHARE_IN_16_BITS = 0.45
"""That of products in 16 bits, of whatever phase, beside which the rest weighs more."""
LIBRARIES = 1.0 * GIB
"""Host memory of Python, JAX, transformers, Orbax and compiled programs; 0.85 to 1.05 GiB were
measured."""


def shapes_of(
    ckpt: str, dtype: np.dtype | None, save_dtype: DTypeLike | None = None
) -> tuple[Spec, Spec, Architecture]:
    """Returns a checkpoint's params, those of its results, and its architecture.

    They come from headers, or from config.json where there is nothing else.

    Args:
        ckpt: its name, as for `convert.open_checkpoint`.
        dtype: the dtype of the computation; None: as in `StreamedModel`.
        save_dtype: the dtype of the results; None: the checkpoint decides, as in
            `casting.saving_dtype`.

    Raises:
        InputError, CheckpointError: there is not even that.
    """
    path = resolve(ckpt, weights=False)
    for module in formats().values():
        if hasattr(module, "Reader") and module.Reader.accepts(path):
            reader = module.Reader(path)
            saved = saving_dtype(reader, save_dtype)
            cast = cast_spec(reader.spec, saved) if saved else reader.spec
            return reader.spec, cast, architecture_of(reader.assets, dtype, reader.spec)
    written = read_config(path)
    stored = np.dtype(written.get("dtype") or written.get("torch_dtype") or "float16")
    architecture = architecture_of(path, dtype or stored)
    spec = cast_spec(architecture.spec, stored)
    return spec, cast_spec(spec, save_dtype or stored), architecture


def need(work: Work, within: float = 0.0) -> Need:
    """Counts what a run needs.

    Args:
        work: the work of the run.
        within: bytes of a device that are there for sure: a program whose every intermediate result
            would fit at once is not compiled to know better.
    """
    spread, here = _spread(work), hardware.current()
    costs = _Costs(work, within)
    elsewhere = here.on_cpu and work.device_bytes is not None
    # Nothing is written anew for this device: the run would trace and compile it all again.
    with (
        writing_for(dataclasses.replace(here, stands_in=True))
        if elsewhere
        else contextlib.nullcontext()
    ):
        every = list(programs_of(spread))
        # on one device loops have a length that is known
        alone = every if spread is work else list(programs_of(work))
        for program, same in zip(every, alone, strict=True):
            costs.add(program, same.flops())
    phases = costs.flops
    disk, states, host = _disk(work), _states(work, phases), _host(work, phases)
    if work.scratch is None:
        host = {phase: size + states[phase] for phase, size in host.items()}
    moved = transfers(work, list(phases))
    kept, seconds = disk["the checkpoint"], costs.seconds(moved)
    return Need(
        device=costs.peaks,
        host=host,
        disk=disk,
        scratch=states,
        kept=kept,
        flops=costs.flops,
        transfers=moved,
        traffic=costs.traffic,
        exchanged=costs.exchanged,
        seconds=seconds,
        costs=tuple(costs.programs),
    )


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
    whole = Shapes(
        work.architecture,
        stored_dtype(work.spec),
        work.devices,
        work.batch_tokens,
        work.device_bytes,
    )
    recipe, shapes = work.recipe, dataclasses.replace(whole, stored=stored_dtype(work.saved))
    # a given mask takes no more than selecting one
    own = recipe.pattern
    pattern: Pattern = Unstructured(0.5) if isinstance(own, Given) else own
    if share := recipe.experts.drop_experts:
        yield from programs.of_experts(whole, work.windows, work.length)
        shapes = dataclasses.replace(shapes, architecture=without_experts(work.architecture, share))
    if recipe.importance.measured:
        yield from programs.of_sensitivity(
            shapes, recipe.importance.windows_of(work.windows), work.length
        )
    sizes, drifts = (work.windows, work.length), recipe.asymmetry > 0
    yield from programs.of_pruning(
        _routing_all(shapes, recipe), *sizes, recipe.method, pattern, asymmetry=drifts
    )
    if recipe.tuning.tunes:
        held_out = work.held_out, work.length
        yield from programs.of_distillation(
            shapes, work.steps, work.placement, held_out, whole, pattern
        )
    if recipe.quantize:
        yield from programs.of_quantization(
            _routing_all(shapes, recipe), work.windows, work.length, recipe.quantize
        )
    for windows, length in work.texts:
        yield from programs.of_evaluation(shapes, windows, length, whole)


def _routing_all(shapes: Shapes, recipe: Recipe) -> Shapes:
    """Returns the shapes of the loop over layers, in which every token may pass every expert, fewer
    at a time."""
    routing = shapes.architecture.config.routing
    if routing is None or not recipe.experts.route_all:
        return shapes
    tokens = max(
        1,
        (shapes.tokens or hardware.current().tokens_per_batch)
        * routing.per_token
        // routing.experts,
    )
    return dataclasses.replace(
        shapes, architecture=shapes.architecture.routed(route_all=True), tokens=tokens
    )


class _Costs:
    """What programs need and take, by phase.

    Args:
        work: what the run is asked to do.
        within: see `need`.

    Attributes:
        flops: phase -> FLOPs of all calls.
        peaks: phase -> bytes on a device at most, or no less.
        traffic: phase -> bytes that all calls move on a target's device.
        exchanged: phase -> bytes that all calls send from a target's device to others.
        programs: what each costs on a target, where its compiler is there.
    """

    def __init__(self, work: Work, within: float) -> None:
        self._work, self._within = work, within
        self._seconds: dict[str, float] = {}
        self.flops: dict[str, Flops] = {}
        self.peaks: dict[str, int] = {}
        self.traffic: dict[str, float] = {}
        self.exchanged: dict[str, float] = {}
        self.programs: list[Cost] = []

    def add(self, program: Program, flops: Flops) -> None:
        """Adds a program, with the FLOPs of a call."""
        target, phase, moved, sent = self._work.target, program.phase, 0.0, 0.0
        own = {kind: n / self._work.devices.count for kind, n in flops.items()}
        peak = program.most_bytes()
        if target is not None and target.has_compiler:
            start = time.perf_counter()
            compiled = program.compiled(target.options)
            spent, module = time.perf_counter() - start, hlo.Module(compiled.as_text() or "")
            peak, moved, sent = program.peak_bytes(compiled), module.traffic(), module.exchanged()
            self.exchanged[phase] = self.exchanged.get(phase, 0.0) + program.calls * sent
            self.traffic[phase] = self.traffic.get(phase, 0.0) + program.calls * moved
            times = target.seconds(own, moved, sent), target.seconds(own, outside_bytes(compiled))
            self.programs.append(
                Cost(phase, program.name, program.calls, *times, spent, module.instructions())
            )
        elif target is None and peak >= self._within:
            peak = program.peak_bytes()
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
        total = self.flops.setdefault(phase, Flops())
        total.update({dtype: int(n * program.calls) for dtype, n in flops.items()})
        if target is not None:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + program.calls * target.seconds(
                own, moved, sent
            )

    def seconds(self, transfers: Mapping[str, float]) -> dict[str, float]:
        """Returns phase -> the time of its programs on the target, or of its transfers if that is
        longer."""
        target = self._work.target
        if target is None:
            return {}
        link = target.link * self._work.devices.count
        return {
            phase: max(spent, transfers[phase] / link) for phase, spent in self._seconds.items()
        }


def _host(work: Work, phases: Mapping[str, Any]) -> dict[str, float]:
    """Returns phase -> host memory besides what the device needs and the hidden states."""
    layer = _layer_bytes(work.saved)
    # One layer being pruned, one read ahead, one as it goes out, one being committed, and that
    # one's copy; experts are stacked, which copies them as they come in.
    copies = 7 if any(layer.experts for layer in work.architecture.layers) else 5
    found = dict.fromkeys(phases, max(peak_bytes()["host"], LIBRARIES) + copies * layer)
    if work.saved != work.spec:  # one that is read ahead, before it is cast
        found = {phase: size + _layer_bytes(work.spec) for phase, size in found.items()}
    if "sensitivity" in phases:
        some = work.recipe.importance.windows_of(work.windows)
        energies = (
            4 * sum(len(layer.reads) for layer in work.architecture.layers) * some * work.length
        )
        found["sensitivity"] += energies
        for phase in ("gram", "solve", "forward"):
            found[phase] += 2 * energies * work.recipe.importance.weighs
    if "tune" in phases:
        kernels = work.pruned_bytes
        found["tune"] += work.stored_bytes() - kernels + work.mask_bytes + best_step_bytes(work)
        if not work.placement.results:  # the layers' inputs, until their backward pass
            found["tune"] += len(work.architecture.layers) * work.states_bytes(*work.steps.shape)
        # The pruned kernels are there at first; layer by layer the tuning's state takes their
        # place, here or there.
        if not work.placement.state:
            found["tune"] += max(kernels, work.tuned_bytes) + work.mask_bytes
        else:
            found["tune"] += max(0, kernels - work.tuned_bytes) if work.on_cpu else kernels
    return found


def _layer_bytes(spec: Spec) -> int:
    """Returns the bytes of the largest layer's params."""
    sizes = Counter[str]()
    for path, param in spec.items():
        sizes[part_of(path)] += param.size * param.dtype.itemsize
    return max(size for part, size in sizes.items() if part.startswith("layers."))


def _states(work: Work, phases: Mapping[str, Any]) -> dict[str, float]:
    """Returns phase -> bytes of the hidden states that a process keeps at a time."""
    hidden = work.states_bytes(work.windows, work.length)
    found: dict[str, float] = dict.fromkeys(phases, hidden * (2 if work.recipe.asymmetry else 1))
    if "tune" in phases:
        of_steps = work.states_bytes(max(work.dense_groups), work.steps.length)
        # the dense model's, the student's
        found["tune"] = of_steps + 2 * work.states_bytes(work.held_out, work.length)
    if "sensitivity" in phases:
        some = work.states_bytes(work.recipe.importance.windows_of(work.windows), work.length)
        inputs = (len(work.architecture.layers) + 1) * some
        found["sensitivity"] = 2 * some + (inputs if work.scratch else min(HOST_BYTES, inputs))
    if work.texts:
        found["evaluate"] = 2 * max(work.states_bytes(*text) for text in work.texts)
    return {phase: size / jax.process_count() for phase, size in found.items()}


def _disk(work: Work) -> dict[str, int]:
    """Returns what -> bytes on the output's disk."""
    tuned, quantized = work.recipe.tuning.tunes, work.recipe.quantize is not None
    layers = work.stored_bytes("layers.")
    hidden, copies = work.states_bytes(work.windows, work.length), 2 if tuned or quantized else 1
    return {
        "the checkpoint": work.stored_bytes(),
        # one goes when the next is whole
        "layers that are finished": (layers + work.mask_bytes) * copies,
        "hidden states": 2 * hidden * (2 if work.recipe.asymmetry else 1),
        "tuning": 2 * ((work.tuned_bytes + work.mask_bytes) * tuned + best_step_bytes(work)),
    }


def best_step_bytes(work: Work) -> int:
    """Returns the bytes of the kernels that were best on windows held out, which a tuning by epochs
    does not keep."""
    return work.pruned_bytes * (work.recipe.tuning.tune_tokens > 0)


def seconds(need: Need, devices: Devices = ONE_DEVICE) -> dict[str, float]:
    """Predicts how long each phase takes, from the matrix rate of this machine, measured once a
    process; a CPU that is divided into devices has no more than one."""
    count = 1 if hardware.current().on_cpu else devices.count

    def of(phase: str, dtype: str, flops: int) -> float:
        share = (
            SHARE_IN_16_BITS if dtype in ("bfloat16", "float16") else SHARE_OF_RATE.get(phase, 0.75)
        )
        return flops / (machine.matrix_rate(dtype) * share * count)

    return {
        phase: sum(of(phase, *one) for one in flops.items()) for phase, flops in need.flops.items()
    }
