"""One kernel pruned and rounded to its stored dtype, its mask, and what it lost."""

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
from jaxprune.sparsity.patterns import Pattern, Sections, by_section, in_sections


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """Statistics of one pruned kernel.

    Attributes:
        error: ‖XW − XŴ‖² / ‖XW‖² of the weights as solved and stored, before any distillation, on
            the calibration tokens as the solve weighs them.
        zeros: exact zeros of the stored kernel.
        wanted: zeros that the pattern or the given mask wants; a weight that it keeps may be zero
            all the same.
        size: weights of the kernel.
        stats: what the method reports; of an expert also how many tokens it was given, and its
            inputs.
        sections: zeros of each of the linear layers that lie side by side in it; none where it is
            one.
    """

    error: Measured
    zeros: Count
    wanted: Count
    size: Annotated[int, Field(ge=1, le=2**53)]
    stats: dict[str, Measured] = dataclasses.field(default_factory=dict)
    sections: dict[str, Count] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if max(self.zeros, self.wanted) > self.size:
            raise ValueError("no more zeros than weights")

    @property
    def few_tokens(self) -> bool:
        """Whether it is an expert's that was given fewer tokens than it has inputs."""
        return self.stats.get("tokens", 0.0) < self.stats.get("inputs", 0.0)


def dense_result(kernel: Float[Array, "n m"], sections: Sections = ()) -> KernelResult:
    """Returns what became of a kernel that stays dense: nothing."""
    zeros = fetch(jnp.sum(kernel == 0, axis=0, dtype=jnp.int32))
    return KernelResult(0.0, int(zeros.sum()), 0, kernel.size, {}, by_section(zeros, sections))


class Linear(NamedTuple):
    """What the solve of one linear layer starts from, beside its inputs.

    Attributes:
        kernel: returns the dense kernel [n_in, n_out], on the device.
        target: its pattern, or its mask.
        outputs: √c, one weight an output; None: all weigh the same.
        sections: the linear layers that lie side by side in it, each of which gets its share of an
            unstructured pattern's zeros; none where it is one.
    """

    kernel: Callable[[], Float[Array, "n m"]]
    target: Pattern | StoredMask
    outputs: Float[np.ndarray, "m"] | None = None
    sections: Sections = ()


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
    """Prunes one kernel and rounds it to the dtype that it is stored in.

    With weights c of the outputs the method solves for W C^½, C = diag(c). Each output's update
    stays the same, but a mask over the whole kernel goes where the loss is sensitive.

    Args:
        method: the pruning method.
        prepared: what it made of the Gram matrix.
        gram_matrix: the Gram matrix of the kernel's inputs, float32.
        kernel: the dense kernel, in the dtype it is to be stored in.
        linear: what else is known of its linear layer.
        wanted: the kernel whose outputs are wanted; None: the dense kernel's own.
        quantization: the type, of `quantization.BITS`, on whose grid the pruned weights are to lie;
            None: on none.
        devices: the devices that the outputs are sharded over.

    Returns:
        The stored kernel, its mask, and what became of it.
    """
    choice: Pattern | Mask
    if isinstance(linear.target, StoredMask):
        given = linear.target.read()
        choice, zeros = devices.shard_outputs(given), given.size - int(np.count_nonzero(given))
    else:
        choice = in_sections(linear.target, linear.sections)
        zeros = linear.target.zeros(kernel.shape)
    scale = None
    if linear.outputs is not None:
        scale = np.asarray(linear.outputs, gram_matrix.dtype)[None, :]
    kernel = devices.shard_outputs(kernel)
    weight = kernel.astype(gram_matrix.dtype) if wanted is None else wanted
    # nothing that is as large as a kernel stays longer than it is needed
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
        sections=by_section(found, linear.sections),
    )
    return stored, mask, result


@jax.jit
def store(gram_matrix: Array, dense: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
    """Rounds a kernel to the dense one's dtype; measures what the layer's output lost by it, and
    zeros by output."""
    stored = round_kernel(weight, weight != 0, dense.dtype)
    zeros = jnp.sum(stored == 0, axis=0, dtype=jnp.int32)
    return stored, {"error": gram.relative_error(gram_matrix, dense, stored), "zeros": zeros}


def round_kernel(
    weight: Float[Array, "*e n m"], kept: Bool[Array, "*e n m"], dtype: DTypeLike
) -> Float[Array, "*e n m"]:
    """Rounds a kernel to a dtype; no kept weight rounds to zero, so that the count of zeros stays
    exact."""
    stored = weight.astype(dtype)
    least = jnp.asarray(_smallest(stored.dtype), dtype)
    return jnp.where(kept & (stored == 0), jnp.where(weight < 0, -least, least), stored)


def _smallest(dtype: np.dtype) -> float:
    """Returns the smallest positive number that no backend flushes to zero."""
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)
