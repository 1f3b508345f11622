"""Whole runs side by side: jaxprune, the way of the well-known PyTorch scripts, and jaxprune
without compilation."""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from alone import alone
from markdown import markdown
from rates import Rate
from sizes import SIZES, write_checkpoint

from convert import Reader, open_checkpoint
from jaxprune import ADMM, Unstructured, calibration, load
from jaxprune.commands.terminal import keep_memory
from jaxprune.costs.flops import Flops
from jaxprune.costs.shapes import Shapes
from jaxprune.models import stored_dtype
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs

SPARSITY = 0.5
METHOD = ADMM(schedule="constant")


class Task(NamedTuple):
    """What every way does.

    Attributes:
        ckpt: the checkpoint.
        tokens: [windows, length].
        layers: how many, from the first.
        dtype: of the computation.
    """

    ckpt: str
    tokens: np.ndarray
    layers: int
    dtype: str

    def open(self) -> Reader:
        """A reader of the checkpoint."""
        return open_checkpoint(self.ckpt)


class Outcome(NamedTuple):
    """What a way did.

    Attributes:
        seconds: by phase, and of all.
        kernels: of all layers, path -> kernel [n, m].
    """

    seconds: dict[str, float]
    kernels: dict[str, np.ndarray]


class Floor(NamedTuple):
    """The least time that jaxprune's run could take.

    Attributes:
        flops: counted.
        seconds: at the matrix rate.
        rate: in words, measured before and after the run.
    """

    flops: Flops
    seconds: float
    rate: str


def jaxprune_way(task: Task) -> Outcome:
    keep_memory()  # as the command line does
    # looked up now, for `op_by_op` replaces it
    loop = importlib.import_module("jaxprune.loop")
    model = importlib.import_module("jaxprune.api.load").load(task.ckpt, dtype=task.dtype)
    spent: dict[str, float] = {}
    kernels = {}
    start = time.perf_counter()
    method = importlib.import_module("jaxprune.methods.admm").ADMM(schedule="constant")
    pattern = importlib.import_module("jaxprune.sparsity.patterns").Unstructured(SPARSITY)
    layers = loop.prune_layers(model, task.tokens, method, pattern)
    for layer in itertools.islice(layers, task.layers):
        for phase, seconds in layer.figures.seconds.items():
            spent[phase] = spent.get(phase, 0.0) + seconds
        kernels |= {path: array for path, array in layer.params.items() if path.endswith(".kernel")}
    return Outcome(spent | {"all": time.perf_counter() - start}, kernels)


def torch_way(task: Task) -> Outcome:
    import torch
    from pytorch_way import prune_layers

    from convert.pytorch import to_torch

    reader = task.open()
    whole = to_torch(reader.read(reader.spec), reader.assets, task.dtype)
    whole = whole.to("cuda" if torch.cuda.is_available() else "cpu").model
    device = whole.embed_tokens.weight.device
    with torch.no_grad():
        tokens = torch.tensor(task.tokens, dtype=torch.long, device=device)
        states = [whole.embed_tokens(window[None]) for window in tokens]
    start = time.perf_counter()
    clock = prune_layers(whole.layers[: task.layers], states, whole.rotary_emb, SPARSITY)
    seconds = clock.seconds | {"all": time.perf_counter() - start}
    kernels = {
        f"layers.{index}.{name}.kernel": module.weight.detach().T.float().cpu().numpy()
        for index, layer in enumerate(whole.layers[: task.layers])
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return Outcome(seconds, kernels)


def eager_way(task: Task) -> Outcome:
    with jax.disable_jit():
        return jaxprune_way(task)


def op_by_op_way(task: Task) -> Outcome:
    """With jaxprune imported again under a jax.jit that does nothing; JAX's own functions stay
    compiled."""

    def leave(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return function

    for name in [name for name in sys.modules if name.partition(".")[0] == "jaxprune"]:
        del sys.modules[name]
    real, jax.jit = jax.jit, leave
    for name in ("loop", "methods.admm", "models.common.decoder", "api.load"):
        importlib.import_module(f"jaxprune.{name}")
    jax.jit = real
    return jaxprune_way(task)


WAYS: dict[str, Callable[[Task], Outcome]] = {
    "torch": torch_way,
    "eager": eager_way,
    "op-by-op": op_by_op_way,
}


def measured(task: Task) -> tuple[Outcome, Floor]:
    """jaxprune's run, compiled beforehand, and its floor."""
    jaxprune_way(task._replace(layers=1))  # compiles
    flops = _flops(task)
    rate = Rate(set(flops))
    rate.measure(3)
    outcome = jaxprune_way(task)
    rate.measure(3)
    return outcome, Floor(flops, rate.floor(flops), str(rate))


def _flops(task: Task) -> Flops:
    model = load(task.ckpt, dtype=task.dtype)
    shapes = Shapes(model.architecture, stored_dtype(model.reader.spec), ONE_DEVICE)
    counted = layer_costs.programs(shapes, *task.tokens.shape, METHOD, Unstructured(SPARSITY))
    flops = Flops()
    for program in counted:
        times = program.calls * task.layers / model.num_layers
        flops.update({dtype: count * times for dtype, count in program.flops().items()})
    return flops


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs jaxprune and the other ways in turn, each in a process of its own; prints a table,
    returns its figures.

    This process leaves the device alone, for JAX would take most of its memory.
    """
    ours: list[tuple[Outcome, Floor]] = []
    others: dict[str, list[Outcome]] = {name: [] for name in args.against}
    with _task(args) as task:
        for _ in range(args.repeat):
            ours.append(alone(measured, task))
            for name in others:
                others[name].append(alone(WAYS[name], task))
    first, floor = min(ours, key=lambda run: run[0].seconds["all"])
    best = {
        name: min(outcomes, key=lambda outcome: outcome.seconds["all"])
        for name, outcomes in others.items()
    }
    rows = []
    for name, (seconds, kernels) in {"jaxprune": first, **best}.items():
        phases = [f"{seconds[phase]:.1f}" for phase in ("gram", "solve", "forward", "all")]
        ratio = seconds["all"] / first.seconds["all"]
        rows.append([name, *phases, f"{ratio:.2f}", *_agreement(first.kernels, kernels)])
    header = [
        "way",
        "gram, s",
        "solve, s",
        "forward, s",
        "all, s",
        "over jaxprune's",
        "equal masks",
        "difference",
    ]
    windows, length = task.tokens.shape
    print(
        f"{task.layers} layers, {windows} windows of {length} tokens, {task.dtype}; the best of "
        f"{args.repeat}\n"
    )
    print("\n".join(markdown(header, rows)))
    share = first.seconds["all"] / floor.seconds
    print(
        f"\nMatrix rate: {floor.rate}. {sum(floor.flops.values()) / 1e12:.2f} TFLOP at that rate "
        "are"
    )
    print(f"{floor.seconds:.1f} s, the floor; jaxprune takes {share:.2f} times as long.")
    print("Difference: relative, of the first layer's kernels.")
    found = {"jaxprune": [outcome for outcome, _ in ours], **others}
    seconds = {name: [outcome.seconds for outcome in outcomes] for name, outcomes in found.items()}
    return {"seconds": seconds, "floors": [floor._asdict() for _, floor in ours]}


def _agreement(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """Equal mask entries of all layers; relative difference of the first layer's kernels."""
    equal = sum(int(((ours[path] != 0) == (theirs[path] != 0)).sum()) for path in ours)
    share = equal / sum(kernel.size for kernel in ours.values())
    first = [path for path in ours if path.startswith("layers.0.")]
    pairs = [(ours[path].astype(np.float32), theirs[path].astype(np.float32)) for path in first]
    difference = sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(
        float((a**2).sum()) for a, _ in pairs
    )
    return [f"{100 * share:.3f} %", f"{difference**0.5:.1e}"]


@contextlib.contextmanager
def _task(args: argparse.Namespace) -> Iterator[Task]:
    with tempfile.TemporaryDirectory() as folder:
        ckpt = args.ckpt
        if not ckpt:
            ckpt = str(Path(folder) / "dense")
            size = SIZES[args.size]._replace(vocabulary=1000)
            write_checkpoint(
                Path(ckpt), size._replace(layers=args.layers or size.layers), stored=args.stored
            )
        streamed = load(ckpt, dtype=args.dtype)
        of = streamed.architecture
        if args.calib:
            tokens = calibration.calibration_windows(
                args.calib, streamed.tokenizer, args.windows, args.length, pack=True
            )
        else:
            shape = args.windows, args.length
            tokens = np.random.default_rng(0).integers(0, of.config.vocab_size, shape, np.int32)
        layers = min(args.layers or streamed.num_layers, streamed.num_layers)
        yield Task(ckpt, tokens, layers, args.dtype)


_COUNT = """
import json, sys, time
import jax
from jaxprune.run import main

counts = {"seconds": 0.0, "hits": 0, "misses": 0}

def event(name, **_):
    for which in ("hits", "misses"):
        counts[which] += name == f"/jax/compilation_cache/cache_{which}"

def duration(name, seconds, **_):
    counts["seconds"] += seconds * (name == "/jax/core/compile/backend_compile_duration")

jax.monitoring.register_event_listener(event)
jax.monitoring.register_event_duration_secs_listener(duration)
status = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(status)
"""


def compilation(args: argparse.Namespace) -> dict[str, Any]:
    """What compiling costs a run that finds no cache, and one that finds the first one's."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        dense, tokens = Path(folder) / "dense", Path(folder) / "tokens.npy"
        size = SIZES[args.size]
        write_checkpoint(
            dense, size._replace(layers=args.layers or 4, vocabulary=1000), stored=args.stored
        )
        np.save(
            tokens,
            np.random.default_rng(0).integers(0, 1000, (args.windows, args.length), np.int32),
        )
        flags = [
            "--ckpt",
            dense,
            "--calib",
            tokens,
            "--nsamples",
            args.windows,
            "--seqlen",
            args.length,
        ]
        flags += [
            "--dtype",
            args.dtype,
            "--eval",
            "none",
            "--overwrite",
            "--out",
            Path(folder) / "pruned",
        ]
        flags += ["--preset", args.preset] if args.preset else []
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        for run in ("cold", "warm"):
            start = time.perf_counter()
            command = [sys.executable, "-c", _COUNT, *map(str, flags)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            counts = json.loads(done.stdout.splitlines()[-1]) | {"all": time.perf_counter() - start}
            found[run] = counts
            numbers = [str(counts["misses"]), str(counts["hits"])]
            rows.append([run, *numbers, f"{counts['seconds']:.1f}", f"{counts['all']:.1f}"])
    header = [
        "run",
        "compiled",
        "found in the cache",
        "compiling or loading, s",
        "whole process, s",
    ]
    print("\n".join(markdown(header, rows)))
    return found


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds by layers and windows."""
    size = SIZES[args.size]._replace(vocabulary=1000)
    deepest, most = args.layers or 8, args.windows
    rows: list[Sequence[str]] = []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        write_checkpoint(dense, size._replace(layers=deepest), stored=args.stored)
        for layers, windows in [
            (deepest // 4, most),
            (deepest // 2, most),
            (deepest, most),
            (deepest, most // 2),
            (deepest, most // 4),
        ]:
            tokens = np.random.default_rng(0).integers(0, 1000, (windows, args.length), np.int32)
            task = Task(str(dense), tokens, layers, args.dtype)
            jaxprune_way(task._replace(layers=1))  # compiles
            spent = min(
                (jaxprune_way(task).seconds for _ in range(args.repeat)), key=lambda s: s["all"]
            )
            found.append({"layers": layers, "windows": windows, "seconds": spent})
            phases = [f"{spent[phase] / layers:.3f}" for phase in ("gram", "solve", "forward")]
            rows.append(
                [
                    str(layers),
                    str(windows),
                    f"{spent['all']:.2f}",
                    f"{spent['all'] / layers:.3f}",
                    *phases,
                ]
            )
    header = ["layers", "windows", "all, s", "a layer, s", "gram", "solve", "forward"]
    print("\n".join(markdown(header, rows)))
    return {"growth": found}
