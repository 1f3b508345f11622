"""What a run needs, before it begins: device memory by phase, host memory, disk, FLOPs, time.

Shapes are enough: config.json and the headers of the weights, or config.json alone. Device memory
is the compiler's own analysis of the programs that the run will call, or, where even all their
intermediate results fit at once, that sum.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import DTypeLike

from convert import Spec, formats, part_of
from convert.assets import read_config
from convert.casting import cast_spec, saving_dtype
from convert.hub import resolve
from jaxprune import hardware
from jaxprune.costs.flops import Flops
from jaxprune.costs.program import PhaseCosts, Program, outside_bytes
from jaxprune.costs.run_sizes import Removal, RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.evaluation import perplexity
from jaxprune.hardware import writing_for
from jaxprune.models import Architecture, architecture_of, stored_dtype
from jaxprune.phases import PHASES
from jaxprune.planning import this_machine
from jaxprune.planning.hlo_traffic import Module
from jaxprune.planning.target_hardware import Target
from jaxprune.planning.this_machine import peak_bytes
from jaxprune.recipe_parts import NOTHING, Structure
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.structure.sizes import removals

GIB = 2**30
SHARE_OF_RATE = {"sensitivity": 0.6, "tune": 0.7, "evaluate": 0.5}
"""Share of the matrix rate that the float32 products of a phase reach; 0.75 where not named. These
are of a CPU, from docs/performance.md."""
SHARE_IN_16_BITS = 0.45
"""That of products in 16 bits, of whatever phase, beside which the rest weighs more."""
LIBRARIES = 1.0 * GIB
"""Host memory of Python, JAX, transformers, Orbax and compiled programs; 0.85 to 1.05 GiB were
measured."""


def shapes_of(
    ckpt: str,
    dtype: np.dtype | None,
    save_dtype: DTypeLike | None = None,
    structure: Structure = NOTHING,
) -> tuple[Spec, Spec, Architecture, list[Removal]]:
    """Returns a checkpoint's params, those of its results, its architecture, and the removals.

    They come from headers, or from config.json where there is nothing else.

    Args:
        ckpt: its name, as for `convert.open_checkpoint`.
        dtype: the dtype of the computation; None: as in `StreamedModel`.
        save_dtype: the dtype of the results; None: the checkpoint decides, as in
            `casting.saving_dtype`.
        structure: what is removed.

    Raises:
        InputError, CheckpointError: there is not even that, or the parts cannot be removed.
    """
    path = resolve(ckpt, weights=False)
    for module in formats().values():
        if hasattr(module, "Reader") and module.Reader.accepts(path):
            reader = module.Reader(path)
            saved = saving_dtype(reader, save_dtype)
            cast = cast_spec(reader.spec, saved) if saved else reader.spec
            architecture = architecture_of(reader.assets, dtype, reader.spec)
            removed = removals(architecture, reader.assets, structure)
            return reader.spec, cast, architecture, removed
    written = read_config(path)
    stored = np.dtype(written.get("dtype") or written.get("torch_dtype") or "float16")
    architecture = architecture_of(path, dtype or stored)
    spec = cast_spec(architecture.spec, stored)
    removed = removals(architecture, path, structure)
    return spec, cast_spec(spec, save_dtype or stored), architecture, removed


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


@dataclasses.dataclass
class PhaseNeed:
    """What a phase of a run needs.

    Attributes:
        device: bytes on the device at most; on a CPU that is host memory too.
        host: bytes in host memory besides.
        states: bytes of hidden states, in host memory or in the scratch folder.
        flops: FLOPs by kind.
        transfers: bytes between host and device, each way counted.
        traffic: bytes that programs move on the device; 0 where that is not known.
        exchanged: bytes that programs send from a device to others; 0 where that is not known.
        seconds: the least time of programs and transfers on a target, at full rates.
    """

    device: int = 0
    host: float = 0.0
    states: float = 0.0
    flops: Flops = dataclasses.field(default_factory=Flops)
    transfers: float = 0.0
    traffic: float = 0.0
    exchanged: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        phases: what each phase needs, in order.
        disk: what -> bytes on the output's disk at most, until the run ends.
        kept: bytes on that disk afterwards.
        costs: of each program, where a target's compiler has compiled it.
    """

    phases: dict[str, PhaseNeed]
    disk: dict[str, int] = dataclasses.field(default_factory=dict)
    kept: int = 0
    costs: list[Cost] = dataclasses.field(default_factory=list)

    @property
    def device(self) -> int:
        """Bytes on the device at most."""
        return max(phase.device for phase in self.phases.values())

    @property
    def states(self) -> float:
        """Bytes of hidden states at most."""
        return max(phase.states for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        """The least time of all phases on a target."""
        return sum(phase.seconds for phase in self.phases.values())


def need(run: RunSizes, within: float = 0.0, target: Target | None = None) -> Need:
    """Counts what a run needs.

    Args:
        run: the sizes of the run.
        within: bytes of a device that are there for sure: a program whose every intermediate result
            would fit at once is not compiled to know better.
        target: the hardware to plan for; None: this machine's, or any other of so much memory.
    """
    spread, here, base = run.spread(), hardware.current(), _host(run)
    wanted = [phase for phase in PHASES if phase.wanted(run.recipe)]
    stages = sum(phase.layers is not None for phase in wanted)
    found = Need({}, {"the checkpoint": run.stored_bytes()}, run.stored_bytes())
    # the layers of a stage go when those of the next are whole
    layers = (run.stored_bytes("layers.") + run.mask_bytes) * min(2, stages)
    found.disk["layers that are finished"] = layers
    elsewhere = here.on_cpu and run.device_bytes is not None
    # Nothing is rewritten for this device: the run would trace and compile it all again.
    stand_in = writing_for(dataclasses.replace(here, stands_in=True))
    with stand_in if elsewhere else contextlib.nullcontext():
        for phase in wanted:
            costs = phase.costs(spread)
            for name in costs.transfers:
                found.phases.setdefault(name, _row(run, costs, name, base))
            every = list(costs.programs)
            # on one device loops have a length that is known
            alone = every if spread is run else phase.costs(run).programs
            for program, same in zip(every, alone, strict=True):
                row, flops = found.phases[program.phase], same.flops()
                row.flops.update({kind: int(n * program.calls) for kind, n in flops.items()})
                peak = program.most_bytes()
                if target is not None:
                    own = {kind: n / run.devices.count for kind, n in flops.items()}
                    peak = _add_on_target(found, program, own, target) or peak
                elif peak >= within:
                    peak = program.peak_bytes()
                row.device = max(row.device, peak)
            found.disk.update(costs.disk)
    if target is not None:
        for row in found.phases.values():
            row.seconds = max(row.seconds, row.transfers / (target.link * run.devices.count))
    return found


def _row(run: RunSizes, costs: PhaseCosts, phase: str, host: float) -> PhaseNeed:
    """Returns what a phase needs beside its programs; `host` is what all phases need."""
    states = costs.states / jax.process_count()
    host += costs.host + (0 if run.scratch else states)
    return PhaseNeed(host=host, states=states, transfers=costs.transfers[phase])


def _add_on_target(
    found: Need, program: Program, flops: Mapping[str, float], target: Target
) -> int:
    """Adds the time of a program on a target, whose share of its FLOPs are given, and what it
    moves; returns its device memory, 0 where the compiler is not there to tell."""
    row, moved, sent, peak = found.phases[program.phase], 0.0, 0.0, 0
    if target.has_compiler:
        start = time.perf_counter()
        compiled = program.compiled(target.options)
        spent, module = time.perf_counter() - start, Module(compiled.as_text() or "")
        peak, moved, sent = program.peak_bytes(compiled), module.traffic(), module.exchanged()
        row.traffic += program.calls * moved
        row.exchanged += program.calls * sent
        least = target.seconds(flops, moved, sent)
        bound = target.seconds(flops, outside_bytes(compiled))
        identity = program.phase, program.name, program.calls
        found.costs.append(Cost(*identity, least, bound, spent, module.instructions()))
    row.seconds += program.calls * target.seconds(flops, moved, sent)
    return peak


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
        for program in perplexity.programs(shapes, windows, length):  # of two checkpoints
            calls = program.calls * checkpoints / 2
            flops.update({dtype: int(count * calls) for dtype, count in program.flops().items()})
    return Need({"evaluate": PhaseNeed(flops=flops)})


def _host(run: RunSizes) -> float:
    """Returns the host memory that all phases need: the libraries, and layers on their way."""
    # One layer being pruned, one read ahead, one as it goes out, one being committed, and that
    # one's copy; experts are stacked, which copies them as they come in.
    copies = 7 if any(layer.experts for layer in run.architecture.layers) else 5
    found = max(peak_bytes()["host"], LIBRARIES) + copies * _layer_bytes(run.saved)
    # one that is read ahead, before it is cast
    return found + (_layer_bytes(run.spec) if run.saved != run.spec else 0)


def _layer_bytes(spec: Spec) -> int:
    """Returns the bytes of the largest layer's params."""
    sizes = Counter[str]()
    for path, param in spec.items():
        sizes[part_of(path)] += param.size * param.dtype.itemsize
    return max(size for part, size in sizes.items() if part.startswith("layers."))


def seconds(need: Need, devices: Devices = ONE_DEVICE) -> dict[str, float]:
    """Predicts how long each phase takes, from the matrix rate of this machine, measured once a
    process; a CPU that is divided into devices has no more than one."""
    count = 1 if hardware.current().on_cpu else devices.count

    def of(phase: str, kind: str, flops: int) -> float:
        share = SHARE_OF_RATE.get(phase, 0.75)
        if kind in ("bfloat16", "float16"):
            share = SHARE_IN_16_BITS
        return flops / (this_machine.matrix_rate(kind) * share * count)

    return {
        phase: sum(of(phase, *one) for one in row.flops.items())
        for phase, row in need.phases.items()
    }
