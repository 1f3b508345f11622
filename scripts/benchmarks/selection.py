"""Mask selection by counting bits against a sort, side by side.

python scripts/benchmarks selection
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from jaxprune.sparsity.patterns import Scores, Unstructured

SHAPES = [(576, 1536), (1536, 576), (4096, 4096)]


@jax.jit
def by_sorting(scores: Scores, zeros: int) -> jax.Array:
    return scores >= jnp.sort(scores, axis=None)[zeros]


@jax.jit
def by_counting(scores: Scores, selector: object) -> jax.Array:
    return selector(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.local_devices()[0].device_kind}, medians of {args.repeat}, alternating\n")
    print("| n × m | counting, ms | sorting, ms | sorting / counting |")
    print("|---|---|---|---|")
    for shape in SHAPES:
        scores = jnp.abs(jax.random.normal(jax.random.key(0), shape))
        selector = Unstructured(0.5).selector(shape)
        ways = {"counting": lambda s=scores, c=selector: by_counting(s, c)}
        ways["sorting"] = lambda s=scores: by_sorting(s, s.size // 2)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeat + 1):
            masks = []
            for name, way in ways.items():
                start = time.perf_counter()
                masks.append(jax.block_until_ready(way()))
                times[name].append(1e3 * (time.perf_counter() - start))
            assert (masks[0] == masks[1]).all()
        a, b = (statistics.median(values[1:]) for values in times.values())  # the first run compiles
        print(f"| {shape[0]} × {shape[1]} | {a:.1f} | {b:.1f} | {b / a:.1f} |", flush=True)
