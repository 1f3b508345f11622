"""Prunes one kernel, rounds it to its stored dtype and measures the error."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float
from pydantic import Field

from convert.schema import Count, Measured
from jaxprune.methods import Mask, Method, gram
from jaxprune.methods.quantization import BITS, quantize
from jaxprune.sharding import ONE_DEVICE, Devices, fetch
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern, Projections, by_projection, in_projections


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """Statistics of one pruned kernel.

    Attributes:
        error: ‖XW − XŴ‖² / ‖XW‖² of the stored weights after the solve and before distillation, on
            the calibration tokens with the weights of the solve.
        zeros: exact zeros of the stored kernel.
        wanted: zeros that the pattern or the given mask requires. Kept weights may also be zero.
        size: number of weights of the kernel.
        stats: metrics of the method. Those of an expert include its number of tokens and of inputs.
        projections: zeros of each of the fused projections; empty for a single projection.
    """

    error: Measured
    zeros: Count
    wanted: Count
    size: Annotated[int, Field(ge=1, le=2**53)]
    stats: dict[str, Measured] = dataclasses.field(default_factory=dict)
    projections: dict[str, Count] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if max(self.zeros, self.wanted) > self.size:
            raise ValueError("no more zeros than weights")

    @property
    def few_tokens(self) -> bool:
        """Whether the kernel belongs to an expert with fewer tokens than inputs."""
        return self.stats.get("tokens", 0.0) < self.stats.get("inputs", 0.0)


def dense_result(kernel: Float[Array, "n m"], projections: Projections = ()) -> KernelResult:
    """Returns the statistics of a kernel that stays dense."""
    zeros = fetch(jnp.sum(kernel == 0, axis=0, dtype=jnp.int32))
    return KernelResult(
        0.0, int(zeros.sum()), 0, kernel.size, {}, by_projection(zeros, projections)
    )


class Linear(NamedTuple):
    """The kernel of a linear layer and its target.

    Attributes:
        kernel: returns the dense kernel [n_in, n_out], on the device.
        target: its pattern or mask.
        outputs: √c, one weight per output; None: all are 1.
        projections: the fused projections, which share an unstructured pattern's zeros in
            proportion to their sizes; empty for a single projection.
    """

    kernel: Callable[[], Float[Array, "n m"]]
    target: Pattern | StoredMask
    outputs: Float[np.ndarray, "m"] | None = None
    projections: Projections = ()


def prune_and_round(
    method: Method,
    prepared: Any,
    gram_matrix: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    linear: Linear,
    *,
    wanted: Float[Array, "n m"] | None = None,
    quantization: str | None = None,
    devices: Devices = ONE_DEVICE,
) -> tuple[Float[Array, "n m"], Mask, KernelResult]:
    """Prunes one kernel and rounds it to its stored dtype.

    With weights c of the outputs, the method optimizes W C^½, C = diag(c). The update of each
    output is unchanged, but a mask over the whole kernel follows the sensitivity of the loss.

    Args:
        method: the pruning method.
        prepared: the result of the method's `prepare`.
        gram_matrix: the Gram matrix of the kernel's inputs, float32.
        kernel: the dense kernel, in its stored dtype.
        linear: its target, output weights and fused projections.
        wanted: the kernel whose outputs are the target of the solve; None: the dense kernel.
        quantization: a type of `quantization.BITS`, to whose grid the pruned weights are rounded;
            None: no grid.
        devices: the devices over which the outputs are sharded.

    Returns:
        The stored kernel, its mask and its statistics.
    """
    choice: Pattern | Mask
    if isinstance(linear.target, StoredMask):
        given = linear.target.read()
        choice, zeros = devices.shard_outputs(given), given.size - int(np.count_nonzero(given))
    else:
        choice = in_projections(linear.target, linear.projections)
        zeros = linear.target.zeros(kernel.shape)
    scale = None
    if linear.outputs is not None:
        scale = np.asarray(linear.outputs, gram_matrix.dtype)[None, :]
    kernel = devices.shard_outputs(kernel)
    weight = kernel.astype(gram_matrix.dtype) if wanted is None else wanted
    # frees arrays of a kernel's size as soon as possible
    wanted = weight if quantization else None
    weight, mask, metrics = method.solve(
        prepared, weight if scale is None else weight * scale, choice
    )
    weight = weight if scale is None else weight / scale
    if quantization:
        weight = quantize(gram_matrix, wanted, weight, mask, BITS[quantization])
    stored, measured = store(gram_matrix, kernel, weight)
    values = fetch(measured | metrics)
    found = values.pop("zeros")
    result = KernelResult(
        error=float(values.pop("error")),
        zeros=int(found.sum()),
        wanted=zeros,
        size=kernel.size,
        stats={name: float(value) for name, value in values.items()},
        projections=by_projection(found, linear.projections),
    )
    return stored, mask, result


@jax.jit
def store(gram_matrix: Array, dense: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
    """Rounds a kernel to the dtype of the dense one.

    Returns:
        The rounded kernel; the relative error of the layer's output, and the zeros of each output.
    """
    stored = round_kernel(weight, weight != 0, dense.dtype)
    zeros = jnp.sum(stored == 0, axis=0, dtype=jnp.int32)
    return stored, {"error": gram.relative_error(gram_matrix, dense, stored), "zeros": zeros}


def round_kernel(
    weight: Float[Array, "*e n m"], kept: Bool[Array, "*e n m"], dtype: DTypeLike
) -> Float[Array, "*e n m"]:
    """Rounds a kernel to a dtype without new zeros.

    Kept weights that would become zero get the smallest magnitude instead, which keeps the count of
    zeros exact.
    """
    stored = weight.astype(dtype)
    least = jnp.asarray(_smallest(stored.dtype), dtype)
    return jnp.where(kept & (stored == 0), jnp.where(weight < 0, -least, least), stored)


def _smallest(dtype: np.dtype) -> float:
    """Returns the smallest positive number that no backend flushes to zero."""
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)
