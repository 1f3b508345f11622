"""Mask selection by counting bits against a sort, side by side.

python scripts/benchmarks selection
"""

import argparse
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp

from jaxprune.sparsity.patterns import Unstructured
from jaxprune.sparsity.selection import Scores

SHAPES = [(576, 1536), (1536, 576), (4096, 4096)]


@functools.partial(jax.jit, static_argnames="per_output")
def by_sorting(scores: Scores, per_output: bool) -> jax.Array:
    ordered = jnp.sort(scores, axis=0 if per_output else None)
    return scores >= ordered[len(ordered) // 2]


@jax.jit
def by_counting(scores: Scores, selector: object) -> jax.Array:
    return selector(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.local_devices()[0].device_kind}, medians of {args.repeat}, alternating\n")
    print("| n × m | of | counting, ms | sorting, ms | sorting / counting |")
    print("|---|---|---|---|---|")
    for shape, per_output in itertools.product(SHAPES, (False, True)):
        scores = jnp.abs(jax.random.normal(jax.random.key(0), shape))
        selector = Unstructured(0.5, per_output).selector(shape)
        ways = {"counting": lambda s=scores, c=selector: by_counting(s, c)}
        ways["sorting"] = lambda s=scores, p=per_output: by_sorting(s, p)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeat + 1):
            masks = []
            for name, way in ways.items():
                start = time.perf_counter()
                masks.append(jax.block_until_ready(way()))
                times[name].append(1e3 * (time.perf_counter() - start))
            assert (masks[0] == masks[1]).all()
        # the first run compiles
        a, b = (statistics.median(values[1:]) for values in times.values())
        of = "each output" if per_output else "the kernel"
        print(f"| {shape[0]} × {shape[1]} | {of} | {a:.1f} | {b:.1f} | {b / a:.1f} |", flush=True)
