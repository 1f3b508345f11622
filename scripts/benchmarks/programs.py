"""What each compiled program of a run costs: seconds, FLOPs, share of the machine's matrix rate,
device memory.

    python scripts/benchmarks programs --size smollm2-135m --preset best
    python scripts/benchmarks programs --size llama-7b --windows 2 --only solve
    python scripts/benchmarks programs --kernel 4096x11008
    python scripts/benchmarks programs --size llama2-70b --dtype bfloat16 --windows 128 --length
    2048 --count-only

The programs are those that a run calls, with the shapes of that run, on random weights and states;
times are of a whole run's calls. The matrix rate is that of square products in the same process,
measured between the programs; float32 means float32 accuracy. --count-only compiles the programs
for their memory and runs none.

    python scripts/benchmarks programs --ckpt smollm2-135m --against torch eager op-by-op --layers 1
    python scripts/benchmarks programs --size llama-7b --windows 128 --length 2048 --against torch
    --layers 1

With --against whole runs are compared in turn, each in a process of its own; see versus.py. With
--compile and --growth, what compilation costs and how time grows with layers and tokens.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import versus
from alone import alone
from jax import ShapeDtypeStruct as Shape
from markdown import markdown
from rates import Rate, timed
from sizes import SIZES, model

from convert.destination import destination, staged
from convert.writing import write_text
from jaxprune.calibration.text_stream import HELD_OUT
from jaxprune.commands.terminal import keep_memory
from jaxprune.costs.flops import Flops
from jaxprune.costs.program import Program
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import Placement
from jaxprune.distill.schedule import TuningSteps
from jaxprune.methods.admm import ADMM
from jaxprune.methods.gram import gram
from jaxprune.planning.this_machine import describe_hardware
from jaxprune.recipe import PRESETS
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs, sensitivity
from jaxprune.sparsity.patterns import Unstructured

METHOD, PATTERN = ADMM(), Unstructured(0.5)


def parts(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Parts of the programs, to be looked at alone: they are in the totals already."""
    layer = shapes.architecture.layers[0]
    first = next(layer_costs.programs(shapes, windows, length, METHOD, PATTERN))
    params, x, _, grams = first.arguments

    def captures(params: Any, x: jax.Array) -> Any:
        return layer(params, x)[1]

    yield Program("part", "forward with captures", captures, (params, x), first.calls)
    for capture, total in grams.items():
        captured = Shape((*x.shape[:2], len(total)), x.dtype)
        yield Program("part", f"Gram of {capture}", gram, (captured,), first.calls)
    selections = len(shapes.architecture.layers) * len(METHOD.progress())
    for path, shape in layer.kernels.items():
        select = partial(_select, PATTERN.selector(shape))
        yield Program("part", f"mask of {path}", select, (Shape(shape, jnp.float32),), selections)


def _select(selector: Any, scores: jax.Array) -> jax.Array:
    return selector(jnp.abs(scores))


def wanted_programs(args: argparse.Namespace) -> Iterator[Program]:
    """The programs that the command line asks for."""
    if args.kernel:
        for n, m in (map(int, kernel.split("x")) for kernel in args.kernel):
            prepared = jax.eval_shape(METHOD.prepare, Shape((n, n), jnp.float32))
            weight = Shape((n, m), jnp.float32)
            yield Program("solve", f"prepare {n}", METHOD.prepare, (Shape((n, n), jnp.float32),), 1)
            solve = partial(layer_costs.solve, METHOD, PATTERN)
            yield Program("solve", f"solve {n}x{m}", solve, (prepared, weight), 1)
            select = partial(_select, PATTERN.selector((n, m)))
            yield Program("part", f"mask of {n}x{m}", select, (weight,), len(METHOD.progress()))
        return
    size = SIZES[args.size]
    of = model(size._replace(layers=args.layers or size.layers), args.dtype)
    tokens = args.batch and args.batch * args.length
    shapes = Shapes(of, jnp.dtype(args.stored), ONE_DEVICE, tokens)
    yield from layer_costs.programs(shapes, args.windows, args.length, METHOD, PATTERN)
    yield from parts(Shapes(of, jnp.float32, ONE_DEVICE), args.windows, args.length)
    if args.preset:
        preset = PRESETS[args.preset]
        some = preset.importance.windows_of(args.windows)
        yield from sensitivity.programs(shapes, some, args.length)
        placement = Placement(not args.streamed, not args.streamed)
        held_out = HELD_OUT if preset.tuning.tune_tokens else 0
        steps = TuningSteps.of(preset.tuning, args.windows, args.length, held_out * args.length)
        yield from tuning_costs.programs(shapes, steps, placement, (held_out, args.length))


def fill(program: Program) -> tuple[Any, ...]:
    """Arguments of a program's shapes; what is an array stays."""
    generator = np.random.default_rng(0)

    def array(shape: Shape | jax.Array) -> jax.Array:
        if isinstance(shape, jax.Array):
            return shape
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.asarray(
                generator.standard_normal(shape.shape, np.float32) * 0.1, shape.dtype
            )
        return jnp.zeros(shape.shape, shape.dtype)

    def positive(shape: Shape) -> jax.Array:
        x = array(shape)
        return x @ x.T

    if program.name.startswith("prepare"):
        return (positive(program.arguments[0]),)
    if program.name.startswith("solve"):
        prepared, weight = program.arguments
        return METHOD.prepare(positive(Shape(prepared.operator.shape, weight.dtype))), array(weight)
    return jax.tree.map(array, program.arguments)


def measure(wanted: list[Program], repeat: int) -> tuple[list[float], Rate]:
    """Seconds of a call of each program, medians; and the rate."""
    rate = Rate({dtype for program in wanted for dtype in program.flops()})
    seconds = []
    for program in wanted:
        rate.measure()
        arguments, function = (
            fill(program),
            jax.jit(program.function, donate_argnums=program.donated),
        )
        every = [timed(function, *arguments, donated=program.donated) for _ in range(repeat)]
        seconds.append(statistics.median(every))
    rate.measure()
    return seconds, rate


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table, and returns what it holds."""
    wanted = [p for p in wanted_programs(args) if args.only in (None, p.phase)]
    seconds, rate = (None, None) if args.count_only else measure(wanted, args.repeat)
    header = [
        "phase",
        "program",
        "calls",
        "GFLOP",
        "seconds",
        "GFLOP/s",
        "share of the rate",
        "peak, MB",
    ]
    rows: list[list[str]] = []
    found = []
    for index, program in enumerate(wanted):
        flops, peak = program.flops(), program.peak_bytes()
        one = {
            "phase": program.phase,
            "program": program.name,
            "calls": program.calls,
            "flops": flops,
            "peak": peak,
        }
        if seconds and rate:
            one |= {
                "seconds": seconds[index] * program.calls,
                "floor": rate.floor(flops) * program.calls,
            }
        found.append(one)
    phases = list(dict.fromkeys(program.phase for program in wanted))
    totals = [_total(phase, [one for one in found if one["phase"] == phase]) for phase in phases]
    totals.append(_total("all", [one for one in found if one["phase"] != "part"]))
    for one in [*found, *totals]:
        count = sum(one["flops"].values()) * (one["calls"] or 1)
        cells = [
            one["phase"],
            one["program"],
            f"{one['calls']:g}" if one["calls"] else "",
            f"{count / 1e9:.0f}",
        ]
        if "seconds" in one:
            took = one["seconds"]
            cells += [
                f"{took:.2f}",
                f"{count / took / 1e9:.0f}",
                f"{100 * one['floor'] / took:.0f} %",
            ]
        else:
            cells += ["", "", ""]
        rows.append([*cells, f"{one['peak'] / 2**20:.0f}"])
    print("\n".join(markdown(header, rows)))
    if rate:
        print(f"\nMatrix rate, median of the run: {rate}")
    return {
        "programs": found,
        "totals": totals,
        "rate": str(rate),
        "arguments": vars(args),
        "hardware": describe_hardware(),
    }


def _total(phase: str, ones: list[dict[str, Any]]) -> dict[str, Any]:
    flops: Flops = Flops()
    for one in ones:
        flops.update({dtype: count * one["calls"] for dtype, count in one["flops"].items()})
    total = {
        "phase": phase,
        "program": "total",
        "calls": 0,
        "flops": flops,
        "peak": max(one["peak"] for one in ones),
    }
    if "seconds" in ones[0]:
        total |= {name: sum(one[name] for one in ones) for name in ("seconds", "floor")}
    return total


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="smollm2-135m", help="a model by size, with random weights"
    )
    parser.add_argument("--ckpt", help="a checkpoint, for comparisons on real weights")
    parser.add_argument("--calib", help="its calibration text (default: random tokens)")
    parser.add_argument(
        "--kernel", nargs="+", metavar="NxM", help="the solve alone, for kernels of these shapes"
    )
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--batch", type=int, help="windows at a time (default: as a run takes them)"
    )
    parser.add_argument("--layers", type=int, help="so many layers only")
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--stored", default="bfloat16", help="of the params")
    parser.add_argument("--preset", choices=PRESETS, help="also the programs that a preset adds")
    parser.add_argument(
        "--streamed", action="store_true", help="its tuning keeps one layer on the device, not all"
    )
    parser.add_argument(
        "--only", choices=["gram", "solve", "forward", "sensitivity", "tune", "part"]
    )
    parser.add_argument("--count-only", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--against", nargs="+", choices=versus.WAYS, default=[])
    parser.add_argument("--compile", action="store_true", help="cold and warm compilation instead")
    parser.add_argument("--growth", action="store_true", help="time by layers and tokens instead")
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args()
    if args.kernel and not all(
        re.fullmatch(r"[1-9]\d*x[1-9]\d*", kernel) for kernel in args.kernel
    ):
        parser.error("--kernel wants shapes such as 4096x11008")
    return args


def main() -> None:
    args = parse()
    if args.json:
        place = destination(args.json, "json", folder=False)
        place.check()
    keep_memory(large=args.preset is not None)  # as the command line does
    # other processes may need the device to themselves
    print(f"{alone(describe_hardware)}; jax {jax.__version__}\n")
    if args.against:
        found = versus.compare(args)
    elif args.compile:
        found = versus.compilation(args)
    elif args.growth:
        found = versus.growth(args)
    else:
        found = report(args)
    if args.json:
        with staged(place) as file:
            write_text(file, json.dumps(found, indent=1) + "\n")
