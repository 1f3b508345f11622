"""Adafactor for the kernels of a layer: initialization, a step, rounding.

The step of a kernel is relative to the root mean square (rms) of its kept weights. One learning
rate therefore serves all kernels and models. The direction is the gradient over the root of its
second moment. We store row and column means of the second moment over the kept weights, r and c.
The second moment of a weight is r_i·c_j / mean(r).

There is no momentum. An unusual text could make a step several times larger than others, and a very
sparse model recovers slowly from it. Therefore a step whose rms is above 1 is divided by its rms.

In a 16-bit computation the weights have 16 bits, too. A step is hardly larger than the spacing of
the weights, and in bfloat16 far smaller. Rounding is therefore dithered: over many steps a weight
is rounded up as often as it is near the value above. The state is thus the weights' own 2 bytes.
With Adam's moments in float32 it would be 12 bytes, and the divergence would fall by at most a few
tenths of a percent: see docs/notes/quality.md.

References:
    Shazeer and Stern, "Adafactor" (arXiv 1804.04235). Roberts, "The unreasonable effectiveness of
    quasirandom sequences" (2018), for the additive sequence in three dimensions that dithers the
    rounding.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from convert import Params
from jaxprune.methods.linalg import masked
from jaxprune.models import Layer
from jaxprune.sharding import Devices
from jaxprune.solve.kernel import round_kernel

DECAY = 0.9
"""Decay of the second moment per step. It is short because a tuning has tens to a few thousand
steps."""
SHARES_DECAY = 0.98
"""Decay per step of the relative squared gradients that gradual pruning ranks weights by. Each step
has equal weight in them, so one unusual text with large gradients does not decide."""
EPSILON = 1e-30
"""Added to squared gradients."""
SEQUENCE = tuple(round(2**32 / 1.2207440846057596**k) for k in (1, 2, 3))
"""Increments of the dither per input, output and step: powers of the root of x⁴ = x + 1, times 2³².
Their sums modulo 2³² fill the interval evenly along each axis."""


class Moving(NamedTuple):
    """The part of a kernel's state that steps change.

    Attributes:
        value: [n, m] float32, bfloat16 or float16; experts' kernels are stacked, [e, n, m].
        rows: second moment, the mean over the kept weights of each input.
        columns: the same of each output.
        row_shares: average over more steps of each input's mean squared gradient, relative to that
            of the kernel.
        column_shares: the same of each output.
    """

    value: Float[Array | np.ndarray, "*e n m"]
    rows: Float[Array | np.ndarray, "*e n"]
    columns: Float[Array | np.ndarray, "*e m"]
    row_shares: Float[Array | np.ndarray, "*e n"]
    column_shares: Float[Array | np.ndarray, "*e m"]


class Fixed(NamedTuple):
    """The part of a kernel's state that only gradual pruning changes.

    Attributes:
        mask: bits of the kept weights, eight inputs per byte, [ceil(n / 8), m], a layout that TPUs
            unpack quickly. All kept weights are trained. During gradual pruning masked weights are
            trained too, and may be kept again later.
        row_counts: number of trained weights of each input.
        column_counts: number of trained weights of each output.
        rms: rms of the weights that were kept at first. Experts have one each, [e, 1, 1]; 0 for
            those that are not trained.
    """

    mask: UInt8[Array | np.ndarray, "*e _ m"]
    row_counts: Float[Array | np.ndarray, "*e n"]
    column_counts: Float[Array | np.ndarray, "*e m"]
    rms: Float[Array | np.ndarray, "*u"]


class Kernels(NamedTuple):
    """The kernels of one layer's pruned linear layers under Adafactor, by name.

    Attributes:
        moving: the parts that steps change.
        fixed: the parts that they do not change; see `Fixed`.
    """

    moving: dict[str, Moving]
    fixed: dict[str, Fixed]

    @property
    def values(self) -> dict[str, Any]:
        """Name -> kernel, including masked weights that are still trained."""
        return {name: moving.value for name, moving in self.moving.items()}

    @property
    def masks(self) -> dict[str, Any]:
        """Name -> bits of the mask."""
        return {name: fixed.mask for name, fixed in self.fixed.items()}


def init(
    kernels: Params,
    dtype: np.dtype,
    experts: Mapping[str, Sequence[int | None]] = MappingProxyType({}),
) -> Kernels:
    """Initializes the state of a layer's pruned kernels, on the host.

    Args:
        kernels: name -> kernel; experts' kernels are stacked.
        dtype: the dtype of the computation.
        experts: name of stacked kernels -> the experts that are tuned; the others are fixed.
    """
    # The memory order decides how sums are rounded: one order makes resumed runs identical.
    values = {name: kernel.astype(np.float32, order="C") for name, kernel in kernels.items()}
    fixed = {
        name: _fixed(value, experts[name] if value.ndim == 3 else ())
        for name, value in values.items()
    }
    moving = {}
    for name, value in values.items():
        means = [
            np.zeros_like(counts)
            for counts in 2 * (fixed[name].row_counts, fixed[name].column_counts)
        ]
        moving[name] = Moving(value.astype(weight_dtype(dtype)), *means)
    return Kernels(moving, fixed)


def shapes(layer: Layer, dtype: np.dtype) -> Kernels:
    """Returns shapes and dtypes of `init` for all kernels of a layer except its routers'."""

    def array(*shape: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    moving, fixed = {}, {}
    kernels = {
        f"{path}.kernel": shape
        for path, shape in layer.linears.items()
        if path not in layer.routers
    }
    for name, (*e, n, m) in kernels.items():
        means = counts = array(*e, n), array(*e, m)
        moving[name] = Moving(array(*e, n, m, dtype=weight_dtype(dtype)), *means, *means)
        fixed[name] = Fixed(
            array(*e, -(-n // 8), m, dtype=np.uint8), *counts, array(*e, 1, 1) if e else array()
        )
    return Kernels(moving, fixed)


def weight_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype of the weights in a computation."""
    return dtype if dtype.itemsize == 2 else np.dtype(np.float32)


def _fixed(value: Float[np.ndarray, "*e n m"], tuned: Sequence[int | None]) -> Fixed:
    rms = _rms(value) if value.ndim == 2 else _rms_of_experts(value, tuned)
    return with_mask(rms, np.packbits(value != 0, axis=-2), value)


def with_mask(
    rms: Any, mask: UInt8[np.ndarray, "*e _ m"], value: Float[np.ndarray, "*e n m"]
) -> Fixed:
    """Returns the fixed part of a kernel's state for a mask, on the host.

    Args:
        rms: see `Fixed`.
        mask: bits of the mask.
        value: the kernel; its nonzero weights are trained.
    """
    moves = value != 0
    return Fixed(mask, moves.sum(-1, dtype=np.float32), moves.sum(-2, dtype=np.float32), rms)


def _rms(value: Float[np.ndarray, "n m"]) -> Any:
    return np.sqrt(np.sum(value**2) / np.float32(max(1, (value != 0).sum())))


def _rms_of_experts(
    values: Float[np.ndarray, "e n m"], tuned: Sequence[int | None]
) -> Float[np.ndarray, "e 1 1"]:
    units = [
        _rms(value) if expert in tuned else np.float32(0) for expert, value in enumerate(values)
    ]
    return np.array(units, np.float32)[:, None, None]


def step(
    kernels: Kernels,
    gradients: dict[str, Float[Array, "*e n m"]],
    number: Float[Array, ""],
    rate: Float[Array, ""],
) -> dict[str, Moving]:
    """Takes a step along the gradients, kernel by kernel.

    Args:
        kernels: the state before the step; its arrays on the device are donated.
        gradients: name -> gradient; emptied by this call.
        number: the number of the step, from 1.
        rate: the learning rate of the step.
    """
    return {
        name: step_one(moving, kernels.fixed[name], gradients.pop(name), number, rate)
        for name, moving in kernels.moving.items()
    }


@partial(jax.jit, donate_argnums=0)
def step_one(
    kernel: Moving,
    fixed: Fixed,
    gradient: Float[Array, "*e n m"],
    number: Float[Array, ""],
    rate: Float[Array, ""],
) -> Moving:
    """Takes a step with one kernel.

    Args:
        kernel: the state before the step; donated.
        fixed: the fixed part of the state.
        gradient: the gradient with respect to the kernel.
        number: the number of the step, from 1.
        rate: the learning rate of the step.
    """
    gradient = masked(kernel.value != 0, gradient.astype(jnp.float32))
    square, count = gradient * gradient + EPSILON, jnp.sum(fixed.row_counts, axis=-1, keepdims=True)

    def mean_of(means: Array, counts: Array) -> Array:
        return _mean(jnp.sum(means * counts, axis=-1, keepdims=True), count)

    of_rows = _mean(jnp.sum(square, axis=-1), fixed.row_counts)
    of_columns = _mean(jnp.sum(square, axis=-2), fixed.column_counts)
    rows = DECAY * kernel.rows + (1 - DECAY) * of_rows
    columns = DECAY * kernel.columns + (1 - DECAY) * of_columns
    warm, mean = 1 - DECAY**number, jnp.maximum(mean_of(rows, fixed.row_counts), EPSILON)
    step = gradient * lax.rsqrt(rows / warm)[..., :, None] * lax.rsqrt(columns / mean)[..., None, :]
    # The mean square of the step, with the squared gradient factored like the second moment.
    ratios = mean_of(of_rows / rows, fixed.row_counts) * mean_of(
        of_columns / columns, fixed.column_counts
    )
    of_all = jnp.maximum(mean_of(of_rows, fixed.row_counts), EPSILON)
    size = ratios * warm * mean / of_all
    rate = rate * lax.rsqrt(jnp.maximum(1, size))[..., None]
    value = kernel.value.astype(jnp.float32) - rate * fixed.rms * step  # 0 where no weight is kept
    # An expert may have no tokens.
    weight = (1 - SHARES_DECAY) * (of_all > 2 * EPSILON).astype(jnp.float32)
    row_shares = kernel.row_shares + weight * (of_rows / of_all - kernel.row_shares)
    column_shares = kernel.column_shares + weight * (of_columns / of_all - kernel.column_shares)
    return Moving(
        _dithered(value, kernel.value.dtype, number), rows, columns, row_shares, column_shares
    )


def _dithered(
    value: Float[Array, "*e n m"], dtype: np.dtype, number: Float[Array, ""]
) -> Float[Array, "*e n m"]:
    """Rounds up or down to a dtype with dither, so the mean over many steps is unbiased."""
    dropped = jnp.finfo(value.dtype).nmant - jnp.finfo(dtype).nmant
    if not dropped:
        return value
    row, column = (
        lax.broadcasted_iota(jnp.uint32, value.shape, value.ndim - axis) for axis in (2, 1)
    )
    of_row, of_column, of_step = (jnp.uint32(one) for one in SEQUENCE)
    dither = of_row * row + of_column * column + of_step * number.astype(jnp.uint32)
    bits = lax.bitcast_convert_type(value, jnp.uint32) + (dither >> jnp.uint32(32 - dropped))
    kept = lax.bitcast_convert_type(bits & jnp.uint32(2**32 - 2**dropped), jnp.float32)
    # Dither may turn the bits of a NaN into those of 0.
    return jnp.where(jnp.isnan(value), value, kept).astype(dtype)


def _mean(total: Float[Array, "*s"], count: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return total / jnp.maximum(count, 1)


def rounded(
    kernels: Kernels, name: str, dtype: np.dtype, devices: Devices
) -> Float[Array, "*e n m"]:
    """Rounds a kernel to its stored dtype; no kept weight becomes zero."""
    value, mask = devices.shard_outputs((kernels.moving[name].value, kernels.fixed[name].mask))
    return round_kernel(value, unpacked(mask, value.shape[-2]), dtype)


@jax.jit
def kept(value: Float[Array, "*e n m"], mask: UInt8[Array, "*e _ m"]) -> Float[Array, "*e n m"]:
    """Returns a kernel with masked weights zeroed."""
    return masked(unpacked(mask, value.shape[-2]), value)


def unpacked(bits: UInt8[Array | np.ndarray, "*e _ m"], count: int) -> Bool[Array, "*e n m"]:
    """Unpacks the bits of a mask of `count` inputs."""
    return jnp.unpackbits(bits, axis=-2, count=count).astype(bool)
