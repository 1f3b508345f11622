"""The machine's matrix rate: what FLOPs are measured against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.methods.linalg import matmul
from jaxprune.planning.program import Flops

SQUARE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Size of the products that the matrix rate is measured with."""


class Rate:
    """The machine's matrix rate, FLOP/s by dtype: the median of all measurements so far."""

    def __init__(self, dtypes: set[str]) -> None:
        size = SQUARE.get(jax.default_backend(), 2048)
        self._operands = {dtype: jnp.ones((size, size), dtype) for dtype in sorted(dtypes | {"float32"})}
        self._found: dict[str, list[float]] = {dtype: [] for dtype in self._operands}

    def measure(self, repeat: int = 1) -> None:
        """Measures again."""
        for dtype, x in [*self._operands.items()] * repeat:
            self._found[dtype].append(2 * len(x) ** 3 / timed(_product, x, x))

    def __getitem__(self, dtype: str) -> float:
        return statistics.median(self._found[dtype])

    def floor(self, flops: Flops) -> float:
        """Seconds at these rates."""
        return sum(count / self[dtype] for dtype, count in flops.items())

    def __str__(self) -> str:
        return ", ".join(f"{dtype} {self[dtype] / 1e9:.0f} GFLOP/s" for dtype in self._found)


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return matmul(a, b) if a.dtype == jnp.float32 else jnp.matmul(a, b)


def timed(function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> float:
    """Seconds of a call, results ready, after one that compiles; donated arguments are copied beforehand."""
    for _ in range(2):
        given = [jax.tree.map(jnp.copy, a) if i in donated else a for i, a in enumerate(arguments)]
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(function(*given))
    return time.perf_counter() - start
