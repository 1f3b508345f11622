"""One linear pruned: its kernel as it is to be stored, its mask, and its figures."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from jaxprune import sharding as devices
from jaxprune.methods import Mask, Method
from jaxprune.methods import gram as stats
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern


class LinearResult(NamedTuple):
    """One pruned linear.

    Attributes:
        error: ‖XW − XŴ‖² / ‖XW‖² of the weights as solved and stored, before any tuning, on the calibration tokens as
            the solve weighs them.
        zeros: exact zeros of the stored kernel.
        wanted: zeros that the pattern or the given mask wants; a weight that it keeps may be zero all the same.
        size: weights of the kernel.
        stats: what the method reports.
    """

    error: float
    zeros: int
    wanted: int
    size: int
    stats: dict[str, float]


def solve_linear(
    method: Method,
    prepared: Any,
    gram: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    pattern: Pattern | StoredMask,
    outputs: Float[np.ndarray, "m"] | None = None,
    target: Float[Array, "n m"] | None = None,
) -> tuple[Float[Array, "n m"], Mask, LinearResult]:
    """Prunes one kernel: what is stored, in the kernel's dtype, its mask, and its figures.

    With weights c of the outputs the method solves for W C^½, C = diag(c). Each output's update stays the same, but a
    mask over the whole kernel goes where the loss is sensitive.

    Args:
        method: the pruning method.
        prepared: what it made of the Gram matrix.
        gram: of the linear's inputs.
        kernel: dense, in the dtype it is to be stored in.
        pattern: or a mask made elsewhere.
        outputs: √c, one weight an output.
        target: the kernel whose outputs are wanted; None: the dense kernel's own.
    """
    choice: Pattern | Mask
    if isinstance(pattern, StoredMask):
        mask = pattern.read()
        choice, wanted = devices.by_outputs(mask), mask.size - int(np.count_nonzero(mask))
    else:
        choice, wanted = pattern, pattern.zeros(kernel.shape)
    scale = np.asarray(np.ones(kernel.shape[1]) if outputs is None else outputs, gram.dtype)[None, :]
    kernel = devices.by_outputs(kernel)
    solution = method.solve(prepared, (kernel.astype(gram.dtype) if target is None else target) * scale, choice)
    stored, figures = store(gram, kernel, solution.weight / scale)
    values = devices.fetch(figures | solution.stats)
    result = LinearResult(
        error=float(values.pop("error")),
        zeros=int(values.pop("zeros")),
        wanted=wanted,
        size=kernel.size,
        stats={name: float(value) for name, value in values.items()},
    )
    return devices.everywhere(stored), solution.mask, result


@jax.jit
def store(gram: Array, dense: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
    """The kernel in its stored dtype, and what the layer's output lost by it."""
    stored = round_kernel(weight, weight != 0, dense.dtype)
    zeros = jnp.sum(stored == 0, dtype=jnp.int32)
    return stored, {"error": stats.relative_error(gram, dense, stored), "zeros": zeros}


def round_kernel(weight: Float[Array, "n m"], kept: Mask, dtype: DTypeLike) -> Float[Array, "n m"]:
    """A kernel in the dtype it is to be stored in; no kept weight rounds to zero, so that the count stays exact."""
    stored = weight.astype(dtype)
    least = jnp.asarray(_least(stored.dtype), dtype)
    return jnp.where(kept & (stored == 0), jnp.where(weight < 0, -least, least), stored)


def _least(dtype: np.dtype) -> float:
    """The smallest positive number that no backend flushes to zero."""
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)
