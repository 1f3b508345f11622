"""A GPU, or a TPU, in ten minutes: every program of a run of LLaMA-2-7B, measured against what was
predicted.

    python scripts/benchmarks gpu

Prints four tables: rates of square products of each kind against the data sheet's; each program of
ADMM and of `best` on 128 windows of 2048 tokens in bfloat16, on random weights, with the data
sheet's time, that at the measured rates, and the time it took; the phases' sums; and a layer pruned
by jaxprune, by jaxprune without compilation, and by the way of the well-known PyTorch scripts on
the same card (which takes `jaxprune[torch]` with a build of torch for it).
"""

import argparse
import math
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from alone import alone
from markdown import markdown
from programs import fill
from rates import Rate, timed
from sizes import SIZES, model

from jaxprune import PRESETS, hardware
from jaxprune.costs.flops import BF16X6
from jaxprune.costs.program import Program
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import placement_of
from jaxprune.distill.schedule import TuningSteps
from jaxprune.methods.admm import ADMM
from jaxprune.planning.hlo_traffic import Module
from jaxprune.planning.target_hardware import TARGETS, Target
from jaxprune.planning.this_machine import describe_hardware, square_product
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs, sensitivity
from jaxprune.sparsity.patterns import Unstructured


def target_here() -> Target | None:
    """Returns the target that this machine's device is, if it is one."""
    kind = jax.local_devices()[0].device_kind.lower()
    names = {
        "h100": "h100",
        "a100": "a100",
        "4090": "rtx4090",
        "v5 lite": "v5e",
        "v5p": "v5p",
        "v6 lite": "v6e",
    }
    return next((TARGETS[name] for part, name in names.items() if part in kind), None)


def every_program(args: argparse.Namespace) -> list[Program]:
    shapes = Shapes(model(SIZES[args.size], args.dtype), args.dtype, ONE_DEVICE)
    sizes = args.windows, args.length
    steps = TuningSteps.of(PRESETS["best"].tuning, *sizes)
    placement = placement_of(shapes.architecture, steps.shape)
    return [
        *layer_costs.programs(shapes, *sizes, ADMM(), Unstructured(0.7)),
        *sensitivity.programs(shapes, *sizes),
        *tuning_costs.programs(shapes, steps, placement),
    ]


def table_of_rates(target: Target | None) -> tuple[Rate, list[str]]:
    kinds = {"bfloat16", "float32"} | ({BF16X6} if hardware.current().capability else set())
    rate = Rate(kinds)
    rate.measure(3)
    rows = []
    for kind in sorted(kinds):
        sheet = f"{target.rates[kind] / 1e12:.0f}" if target else ""
        rows.append([kind, f"{rate[kind] / 1e12:.3g}", sheet])
    if BF16X6 in kinds:
        x = square_product("float32")[1]
        product = jax.jit(
            partial(jnp.matmul, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
        )
        rows.append(
            [
                "tf32x3",
                f"{2 * len(x) ** 3 / min(timed(product, x, x) for _ in range(3)) / 1e12:.3g}",
                "",
            ]
        )
    return rate, markdown(["products", "TFLOP/s", "data sheet"], rows)


def table_of_programs(every: list[Program], rate: Rate, target: Target | None) -> list[str]:
    rows, predicted, measured, seen = [], Counter[str](), Counter[str](), {}
    for program in every:
        key = str((program.function, program.arguments))
        if key not in seen:
            moved = Module(program.compiled().as_text() or "").traffic()
            sheet = target.seconds(program.flops(), moved) if target else math.nan
            function = jax.jit(program.function, donate_argnums=program.donated)
            took = timed(function, *fill(program), donated=tuple(program.donated))
            seen[key] = sheet, rate.floor(program.flops()), took
            times = [f"{1e3 * value:.3g}" for value in seen[key]]
            rows.append([program.phase, program.name, f"{program.calls:.0f}", *times])
            print(rows[-1], file=sys.stderr, flush=True)
        sheet, _, took = seen[key]
        predicted[program.phase] += sheet * program.calls
        measured[program.phase] += took * program.calls
    columns = ["phase", "program", "calls", "data sheet, ms", "measured rates, ms", "measured, ms"]
    sums = [[phase, f"{predicted[phase]:.1f}", f"{took:.1f}"] for phase, took in measured.items()]
    return [
        *markdown(columns, rows),
        "",
        *markdown(["phase", "data sheet, s", "measured, s"], sums),
    ]


def measure(args: argparse.Namespace) -> list[str]:
    """Returns the lines of the first three tables."""
    target = target_here()
    rate, lines = table_of_rates(target)
    head = [
        f"{describe_hardware()}; jax {jax.__version__}; {args.size}, {args.dtype}",
        "",
    ]
    return [*head, *lines, "", *table_of_programs(every_program(args), rate, target)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="llama-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument(
        "--against",
        nargs="*",
        choices=["torch", "op-by-op", "eager"],
        default=["torch", "op-by-op"],
    )
    args = parser.parse_args()
    print("\n".join(alone(measure, args)), flush=True)  # the others need the device to themselves
    if args.against:
        line = [
            "programs",
            "--size",
            args.size,
            "--dtype",
            args.dtype,
            "--windows",
            str(min(16, args.windows)),
        ]
        line += ["--length", str(args.length), "--layers", "1", "--against", *args.against]
        print("", flush=True)
        subprocess.run([sys.executable, Path(__file__).parent, *line], check=True)
