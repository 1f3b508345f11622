"""What a run needs, before it begins: device memory by phase, host memory, disk, FLOPs, time; and whether it fits.

Shapes are enough: config.json and the headers of the weights, or config.json alone. Device memory is the compiler's own
analysis of the programs that the run will call, or, where even all their intermediate results fit at once, that sum.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import Spec, formats, part_of
from convert.assets import read_config
from convert.files import expand
from convert.hub import resolve
from jaxprune import sharding as devices
from jaxprune.commands.config import Config
from jaxprune.commands.eval_options import existing_parent
from jaxprune.errors import InputError
from jaxprune.methods.linalg import matmul
from jaxprune.models import Model, model_of, stored_dtype
from jaxprune.planning import programs
from jaxprune.planning.programs import Flops, Program
from jaxprune.pruning.resume import journal_folder
from jaxprune.pruning.sensitivity import HOST_BYTES
from jaxprune.recipe import Recipe
from jaxprune.reporting.record import peak_bytes
from jaxprune.sparsity.patterns import Unstructured
from jaxprune.streaming.hidden_states import TOKENS_PER_BATCH
from jaxprune.streaming.stream import require_length

GIB = 2**30
EVALUATION_TOKENS = 350_000
"""Assumed of a text where --eval-windows does not say: WikiText-2's test split has so many."""
SHARE_OF_RATE = {"sensitivity": 0.6, "tune": 0.7, "evaluate": 0.5}
"""Of the matrix rate, what a phase reaches; 0.75 where not named. From docs/performance.md."""
LIBRARIES = 1.25 * GIB
"""Host memory of Python, JAX, transformers, datasets, Orbax and compiled programs, once a text is prepared."""
HEADROOM = 0.92
"""Of a device's memory, what a program may use: the rest is fragmentation."""


@dataclasses.dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        device: phase -> bytes on the device at most; on a CPU that is host memory too.
        host: phase -> bytes in host memory besides.
        disk: what -> bytes on the disk of --out at most, until the run ends.
        scratch: phase -> bytes of hidden states: host memory, or with --hidden disk room in --scratch.
        kept: bytes on that disk afterwards.
        flops: phase -> FLOPs by dtype.
    """

    device: dict[str, int]
    host: dict[str, float]
    disk: dict[str, int]
    scratch: dict[str, float]
    kept: int
    flops: dict[str, Flops]


def shapes(config: Config) -> tuple[Spec, Model]:
    """The params and the model of a checkpoint, from headers, or from config.json where there is nothing else.

    Raises:
        InputError, CheckpointError: there is not even that, or the windows are longer than the model takes.
    """
    path = resolve(config.ckpt, weights=False)
    for module in formats().values():
        if hasattr(module, "Reader") and module.Reader.accepts(path):
            reader = module.Reader(path)
            model = model_of(reader.assets, config.computation_dtype, reader.spec)
            require_length(model, config.seqlen)
            return reader.spec, model
    written = read_config(path)
    stored = np.dtype(written.get("dtype") or written.get("torch_dtype") or "float16")
    model = model_of(path, config.computation_dtype or stored)
    require_length(model, config.seqlen)
    return {path: jax.ShapeDtypeStruct(shape.shape, stored) for path, shape in model.spec.items()}, model


def need(
    spec: Spec,
    model: Model,
    config: Config,
    recipe: Recipe,
    evaluation: int | None = None,
    within: float = 0.0,
) -> Need:
    """What a run needs.

    Args:
        spec: of the checkpoint.
        model: of the checkpoint.
        config: of the run.
        recipe: of the run.
        evaluation: windows of evaluation; None: as many as are usual.
        within: bytes of a device that are there for sure: a program whose every intermediate result would fit at once
            is not compiled to know better.
    """
    phases: dict[str, list[Program]] = {}
    for program in _programs(spec, model, config, recipe, evaluation):
        phases.setdefault(program.phase, []).append(program)
    flops: dict[str, Flops] = {}
    for phase, ones in phases.items():
        flops[phase] = Flops()
        for program in ones:
            flops[phase].update({dtype: int(count * program.calls) for dtype, count in program.flops().items()})
    device = {phase: max(_peaks(ones, within)) for phase, ones in phases.items()}
    disk = _disk(spec, model, config, recipe)
    states = _states(model, config, recipe, phases, evaluation)
    host = _host(spec, model, config, recipe, phases)
    if config.hidden == "memory":
        host = {phase: size + states[phase] for phase, size in host.items()}
    return Need(device, host, disk, states, disk["the checkpoint"], flops)


def _programs(spec: Spec, model: Model, config: Config, recipe: Recipe, evaluation: int | None) -> Iterator[Program]:
    stored, shape = stored_dtype(spec), (config.nsamples, config.seqlen)
    tokens = TOKENS_PER_BATCH["gpu"] if config.device_memory and jax.default_backend() == "cpu" else None
    pattern = recipe.pattern or Unstructured(0.5)  # a given mask takes no more than selecting one
    if recipe.importance.measured:
        some = recipe.importance.windows_of(config.nsamples)
        yield from programs.of_sensitivity(model, some, shape[1], stored, tokens=tokens)
    yield from programs.of_pruning(model, *shape, recipe.method, pattern, stored, tokens=tokens)
    if epochs := recipe.tuning.tune_epochs:
        yield from programs.of_tuning(model, *shape, epochs, stored, keep=_keeps(model), tokens=tokens)
    if "ppl" in config.measures:
        yield from programs.of_evaluation(model, *_evaluation(config, evaluation), stored, tokens=tokens)


def _keeps(model: Model) -> bool:
    """Whether all that a tuning needs stays on the device, as far as can be told without one."""
    return jax.default_backend() == "cpu" and 12 * _weights(model) < 4e9


def _peaks(phase: list[Program], within: float) -> Iterator[int]:
    """Peaks of the programs, or more."""
    for program in phase:
        most = program.most_bytes()
        yield most if most < within else program.peak_bytes()


def _host(spec: Spec, model: Model, config: Config, recipe: Recipe, phases: Mapping[str, Any]) -> dict[str, float]:
    """Phase -> host memory besides what the device needs and the hidden states."""
    layer = sum(_size(spec, path) for path in spec if part_of(path) == "layers.0")
    # One layer being pruned, one read ahead, one as it goes out, one being committed, and that one's copy.
    streaming = max(peak_bytes()["host"], LIBRARIES) + 5 * layer
    found = dict.fromkeys(phases, streaming)
    weights = _weights(model)
    if "sensitivity" in phases:
        some = recipe.importance.windows_of(config.nsamples)
        energies = 4 * model.config.num_layers * len(model.inputs) * some * config.seqlen
        found["sensitivity"] += energies
        for phase in ("gram", "solve", "forward"):
            found[phase] += 2 * energies * (recipe.importance.weighs)
    if "tune" in phases:
        everything = sum(_size(spec, path) for path in spec)
        found["tune"] += everything + weights // 8
        if not _keeps(model):
            found["tune"] += 12 * weights
    return found


def _states(
    model: Model, config: Config, recipe: Recipe, phases: Mapping[str, Any], evaluation: int | None
) -> dict[str, float]:
    """Phase -> bytes of the hidden states that there are at a time."""
    token = model.width * np.dtype(model.config.dtype).itemsize
    hidden = config.nsamples * config.seqlen * token
    found: dict[str, float] = dict.fromkeys(phases, hidden * (2 if recipe.asymmetry else 1))
    if "tune" in phases:
        found["tune"] = hidden
    if "sensitivity" in phases:
        some = recipe.importance.windows_of(config.nsamples) * config.seqlen * token
        inputs = (model.config.num_layers + 1) * some
        found["sensitivity"] = 2 * some + (inputs if config.hidden == "disk" else min(HOST_BYTES, inputs))
    if "evaluate" in phases:
        windows, length = _evaluation(config, evaluation)
        found["evaluate"] = 2 * windows * length * token
    return found


def _disk(spec: Spec, model: Model, config: Config, recipe: Recipe) -> dict[str, int]:
    """What -> bytes on the disk of --out."""
    whole = sum(_size(spec, path) for path in spec)
    layers = sum(_size(spec, path) for path in spec if path.startswith("layers."))
    weights = _weights(model)
    hidden = config.nsamples * config.seqlen * model.width * np.dtype(model.config.dtype).itemsize
    committed = layers + weights // 8
    tuned = recipe.tuning.tune_epochs > 0
    return {
        "the checkpoint": whole,
        "layers that are finished": committed * (1 + tuned),
        "hidden states": 2 * hidden * (2 if recipe.asymmetry else 1),
        "tuning": 2 * 12 * weights * tuned,
    }


def _weights(model: Model) -> int:
    return model.config.num_layers * sum(n * m for n, m in model.linears.values())


def _size(spec: Spec, path: str) -> int:
    return spec[path].size * spec[path].dtype.itemsize


def _evaluation(config: Config, windows: int | None) -> tuple[int, int]:
    length = config.eval_seqlen or config.seqlen
    return windows or config.eval_windows or max(1, EVALUATION_TOKENS // length), length


def require_fit(spec: Spec, model: Model, config: Config, recipe: Recipe, evaluation: int | None) -> None:
    """Raises InputError where a run does not fit, and says what to change; arguments as for `need`."""
    within = (host_memory() if _on_cpu(config) else device_memory()) or 0
    if problems := list(shortages(need(spec, model, config, recipe, evaluation, within / 4), config)):
        raise InputError("the run does not fit:\n  " + "\n  ".join(problems) + "\n--unchecked tries it all the same")


def shortages(need: Need, config: Config) -> Iterator[str]:
    """What does not fit, and what to change."""
    on_cpu = _on_cpu(config)
    device = config.device_memory * GIB if config.device_memory else None if on_cpu else device_memory()
    for phase, size in need.device.items():
        if device is not None and size > HEADROOM * device:
            yield (
                f"{phase} needs {size / GIB:.1f} GiB on a device, of which {HEADROOM * device / GIB:.1f} can be had: "
                + {
                    "solve": "take devices with more memory, or more of them (--devices)",
                    "tune": "leave the tuning out (--tune-epochs 0), or shorten the windows (--seqlen)",
                }.get(phase, "shorten the windows (--seqlen)")
            )
    host, phase = max((size + on_cpu * need.device[phase], phase) for phase, size in need.host.items())
    free = host_memory()
    if free is not None and host > free:
        yield (
            f"{phase} needs {host / GIB:.1f} GiB of host memory, of which {free / GIB:.1f} are free: take fewer or "
            "shorter windows (--nsamples, --seqlen)"
            + ", or put the hidden states on a disk (--hidden disk)" * (config.hidden == "memory")
            + ", or leave the tuning out (--tune-epochs 0)" * (phase == "tune")
        )
    disk, room = sum(need.disk.values()), free_disk(config)
    assert config.out
    if scratch := config.scratch_folder(config.out):
        states, has = max(need.scratch.values()), shutil.disk_usage(scratch).free
        if os.stat(scratch).st_dev == os.stat(existing_parent(config.out)).st_dev:
            disk += int(states)
        elif states > has:
            yield f"{states / GIB:.1f} GiB are needed in {scratch}, {has / GIB:.1f} are free: choose another --scratch"
    if room is not None and disk > room:
        yield f"{disk / GIB:.1f} GiB of disk are needed, {room / GIB:.1f} are free there: choose another --out"


def _on_cpu(config: Config) -> bool:
    """Whether the device's memory is the host's."""
    return jax.default_backend() == "cpu" and config.device_memory is None


def device_memory() -> int | None:
    """Bytes of a device that JAX may use; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> int | None:
    """Bytes that this process may have in all; None where the system does not say."""
    free = []
    info = Path("/proc/meminfo")
    if info.exists():
        found = dict(line.split(":") for line in info.read_text().splitlines())
        free.append(int(found["MemAvailable"].split()[0]) * 1024 + peak_bytes()["host"])
    return min([*free, *_limits()], default=None)


def _limits() -> Iterator[int]:
    """Bytes that this process's control groups, of version 1 or 2, allow it."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            group = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            for folder in (group, *group.parents):  # in a container its own group may be seen as the root
                limit = folder / file
                if limit.exists() and (text := limit.read_text().strip()) != "max":
                    yield int(text)


def free_disk(config: Config) -> int | None:
    """Bytes that --out's disk has free, with what the run has there already."""
    assert config.out
    out = expand(config.out).absolute()
    own = sum(path.stat().st_size for path in journal_folder(out).rglob("*") if path.is_file())
    return shutil.disk_usage(existing_parent(out)).free + own


def matrix_rate(dtype: str) -> float:
    """FLOP/s of this device in square products, with float32 accuracy where the dtype is float32; measured now."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(matmul if dtype in ("float32", "float64") else jnp.matmul)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def table(need: Need, config: Config) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each phase needs, and how long it takes on this machine's own device."""
    dtypes = sorted({dtype for flops in need.flops.values() for dtype in flops})
    rates = {} if config.device_memory else {dtype: matrix_rate(dtype) for dtype in dtypes}
    rows, total = [], 0.0
    for phase, device in need.device.items():
        flops = need.flops[phase]
        row = [phase, _gib(device), _gib(need.host[phase] + _on_cpu(config) * device)]
        row.append(_tera(sum(flops.values())))
        if rates:
            seconds = (
                sum(count / rates[dtype] for dtype, count in flops.items())
                / devices.number()
                / SHARE_OF_RATE.get(phase, 0.75)
            )
            total += seconds
            row.append(duration(seconds))
        rows.append(row)
    every = sum(sum(flops.values()) for flops in need.flops.values())
    most = max(need.host[phase] + _on_cpu(config) * device for phase, device in need.device.items())
    rows.append(["all", _gib(max(need.device.values())), _gib(most), _tera(every)])
    if rates:
        rows[-1].append(duration(total))
    return ["", "device, GiB", "host, GiB", "TFLOP", *["about"] * bool(rates)], rows


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tera(count: int) -> str:
    """TFLOP, four digits or more."""
    return f"{count / 1e12:,.0f}" if count >= 1e15 else f"{count / 1e12:.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
