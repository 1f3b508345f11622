"""The machine's matrix rate: what FLOPs are measured against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.costs.flops import Flops
from jaxprune.planning.this_machine import square_product


class Rate:
    """The machine's matrix rate, FLOP/s by kind of products: the median of all measurements so
    far."""

    def __init__(self, kinds: set[str]) -> None:
        self._products = {kind: square_product(kind) for kind in sorted(kinds | {"float32"})}
        self._found: dict[str, list[float]] = {kind: [] for kind in self._products}

    def measure(self, repeat: int = 1) -> None:
        """Measures again."""
        for kind, (product, x) in [*self._products.items()] * repeat:
            self._found[kind].append(2 * len(x) ** 3 / timed(product, x, x))

    def __getitem__(self, kind: str) -> float:
        return statistics.median(self._found[kind])

    def floor(self, flops: Flops) -> float:
        """Seconds at these rates."""
        return sum(count / self[kind] for kind, count in flops.items())

    def __str__(self) -> str:
        return ", ".join(f"{kind} {self[kind] / 1e9:.0f} GFLOP/s" for kind in self._found)


def timed(function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> float:
    """Seconds of a call, results ready, after one that compiles; donated arguments are copied
    beforehand."""
    for _ in range(2):
        given = [jax.tree.map(jnp.copy, a) if i in donated else a for i, a in enumerate(arguments)]
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(function(*given))
    return time.perf_counter() - start
