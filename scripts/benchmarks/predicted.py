"""Predicted against measured seconds of each phase, with shares of the matrix rate taken from
another model's run.

    python scripts/benchmarks predicted --ckpt smollm2-135m

A random LLaMA of other shapes is pruned with a preset and evaluated; each phase's share of the
machine's matrix rate is what its FLOPs say. The checkpoint's phases are predicted with these
shares, and then measured.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from alone import alone
from markdown import markdown
from sizes import Size, write_checkpoint

from jaxprune import PRESETS, Evaluator, Measures, RunOptions, load, prune
from jaxprune.commands.terminal import keep_memory
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.planning.estimate import need
from jaxprune.planning.this_machine import describe_hardware, matrix_rate

OTHER = Size(768, 2048, 10, 12, 4, vocabulary=32000)


class Run(NamedTuple):
    """By phase: FLOPs and seconds; and the machine's matrix rate around the run, FLOP/s."""

    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    rate: float


def run(ckpt: str, args: argparse.Namespace) -> Run:
    """Prunes and evaluates a checkpoint on random tokens."""
    keep_memory(large=True)  # as the command line does
    model, recipe = load(ckpt), PRESETS[args.preset]
    generator, size = np.random.default_rng(0), (args.windows, args.length)
    tokens = generator.integers(0, model.architecture.config.vocab_size, size, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "text.npy", Path(folder) / "out"
        np.save(text, tokens)
        spec, architecture = model.reader.spec, model.architecture
        sizes = RunSizes(spec, spec, architecture, [], recipe, *size, [size], out)
        needed = need(sizes, within=float("inf"))  # no program is compiled
        for _ in range(2):  # the first one compiles
            rates = [_rate()]
            evaluator = Evaluator(Measures((str(text),), args.length), model)
            result = prune(
                model, tokens, recipe, out, RunOptions(evaluator=evaluator, overwrite=True)
            )
            rates.append(_rate())
    flops = {phase: float(row.flops.total()) for phase, row in needed.phases.items()}
    return Run(flops, dict(result.record.seconds), statistics.mean(rates))


def _rate() -> float:
    """Measures the matrix rate as it is now."""
    matrix_rate.cache_clear()
    return matrix_rate("float32")


def main() -> None:
    windows_alone = [name for name, recipe in PRESETS.items() if not recipe.tuning.tune_tokens]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--preset", choices=windows_alone, default="fast")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "other", OTHER)
        other = alone(run, str(Path(folder) / "other"), args)
    own = alone(run, args.ckpt, args)
    rows = []
    for phase, flops in own.flops.items():
        share = other.flops[phase] / other.rate / other.seconds[phase]
        predicted = flops / own.rate / share
        took = own.seconds[phase]
        ratio = f"{predicted / took:.2f}"
        rows.append(
            [phase, f"{flops / 1e12:.2f}", f"{share:.2f}", f"{predicted:.1f}", f"{took:.1f}", ratio]
        )
    head = [
        "phase",
        "TFLOP",
        "share of the rate, other model's",
        "predicted, s",
        "measured, s",
        "predicted / measured",
    ]
    print(f"{describe_hardware()}, {own.rate / 1e9:.0f} GFLOP/s; {args.ckpt}, {args.preset}\n")
    print("\n".join(markdown(head, rows)))
