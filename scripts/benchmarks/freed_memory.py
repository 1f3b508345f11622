"""What it brings that freed memory is kept (`terminal.keep_memory`): a tuning step with and without
it.

    python scripts/benchmarks freed_memory --ckpt smollm2-135m

Each is a process of its own, one after the other in turn. A step is of one window; the first half
of the steps, in which programs are compiled and memory is taken for the first time, are not
counted. Huge pages may be tried on top (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`).
"""

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from alone import alone
from markdown import markdown

from jaxprune import Context, Magnitude, Observer, Tuning, Unstructured, load, prune_layers
from jaxprune.commands.terminal import keep_compilations, keep_memory
from jaxprune.distill.distillation import distill, of_windows
from jaxprune.planning.this_machine import describe_hardware


class Found(NamedTuple):
    """Medians of steps.

    Attributes:
        seconds: of a step.
        cleared: MB that the system cleared in a step.
        peak: MB of the process.
    """

    seconds: float
    cleared: float
    peak: float


class Moments(Observer):
    """Notes when each step ends, and how many pages were cleared before."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, int]] = []

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        self.moments.append(
            (time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        )


def measure(ckpt: str, length: int, steps: int, keep: bool) -> Found:
    """Tunes a pruned checkpoint for some steps."""
    keep_compilations()
    if keep:
        keep_memory(large=True)
    model = load(ckpt)
    tokens = np.random.default_rng(0).integers(
        0, model.architecture.config.vocab_size, (1, length), np.int32
    )
    layers = prune_layers(model, tokens, Magnitude(), Unstructured(0.5))
    steps_done = Moments()
    tuning = Tuning(tune_epochs=steps)
    for _ in distill(
        model, of_windows(tokens, tuning, 0), layers, tuning, context=Context(observer=steps_done)
    ):
        pass
    counted = [
        (b[0] - a[0], b[1] - a[1])
        for a, b in itertools.pairwise(steps_done.moments[steps // 2 - 1 :])
    ]
    seconds, pages = (statistics.median(values) for values in zip(*counted, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Found(seconds, pages * resource.getpagesize() / 1e6, peak / 1e6)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=512, help="tokens of the window")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args(argv)
    found: dict[bool, list[Found]] = {False: [], True: []}
    for keep in list(found) * args.repeat:
        found[keep].append(alone(measure, args.ckpt, args.length, args.steps, keep))
    print(
        f"{args.ckpt}, a window of {args.length} tokens a step, medians of {args.repeat} processes"
    )
    print(f"{describe_hardware()}\n")
    rows, first = [], None
    for keep, values in found.items():
        one = Found(*map(statistics.median, zip(*values, strict=True)))
        first = first or one
        name = "kept" if keep else "as glibc does"
        ratio = f"{one.seconds / first.seconds:.2f}"
        rows.append([name, f"{one.seconds:.2f}", ratio, f"{one.cleared:.0f}", f"{one.peak:.0f}"])
    print(
        *markdown(["freed memory", "s a step", "ratio", "MB cleared a step", "peak, MB"], rows),
        sep="\n",
    )
