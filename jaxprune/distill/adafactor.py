"""The kernels of a layer under Adafactor: initialization, a step, rounding.

A kernel's step is in units of the root mean square of its kept weights, so that one rate serves all
of them, and all models. It goes along the gradient over the root of its second moment. Of that the
means over the kept weights of each row and of each column are kept, r and c, of which the moment of
a weight is r_i·c_j / mean; there is no momentum. So a text unlike those before it
would make a step several times as large as others, from which a very sparse model is long to
recover: where the root mean square of a step is above 1, the step is divided by it.

In a computation in 16 bits the weights have 16 bits, too: a step is hardly larger than their
spacing, in bfloat16 far smaller, so it is rounded up as often as it is near the value above. So the
state is the weights' own 2 bytes; with Adam's moments, in float32, it would be 12, for a few tenths
of a percent of the divergence at most: see docs/notes/quality.md.

References:
    Shazeer and Stern, "Adafactor" (arXiv 1804.04235). Roberts, "The unreasonable effectiveness of
    quasirandom sequences" (2018), for the additive sequence in three dimensions by which is
    rounded.
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
"""Of the second moment, a step. There are tens of steps, or a few thousand, so its memory is
short."""
SHARES_DECAY = 0.98
"""Of the shares by which is chosen what is kept where zeros come late, a step. Each step counts the
same in them, however large its gradients are; otherwise one text unlike the others decides."""
EPSILON = 1e-30
"""Beside the squares of the gradients."""
SEQUENCE = tuple(round(2**32 / 1.2207440846057596**k) for k in (1, 2, 3))
"""Of a kernel's inputs, its outputs, and steps: powers of the root of x⁴ = x + 1, over 2³². What
they add up to, modulo 1, fills the interval evenly along each of them."""


class Moving(NamedTuple):
    """What a step changes of one kernel.

    Attributes:
        value: [n, m] float32, bfloat16 or float16, or experts' stacked, [e, n, m].
        rows: mean of the gradients' squares over the kept weights of each input.
        columns: over those of each output.
        row_shares: what an input's were over the mean of the kernel, in the mean of more steps.
        column_shares: what an output's were.
    """

    value: Float[Array | np.ndarray, "*e n m"]
    rows: Float[Array | np.ndarray, "*e n"]
    columns: Float[Array | np.ndarray, "*e m"]
    row_shares: Float[Array | np.ndarray, "*e n"]
    column_shares: Float[Array | np.ndarray, "*e m"]


class Fixed(NamedTuple):
    """What no step changes of one kernel, but where zeros come late.

    Attributes:
        mask: bits of the weights that are kept, eight inputs a byte, [ceil(n / 8), m]: TPUs unpack
            them so as they go. All that move, unless zeros are still to come: then what is masked
            moves along, and may be kept again.
        row_counts: how many weights of each input move.
        column_counts: of each output.
        unit: root mean square of the weights that were kept at first; of experts one each, [e, 1,
            1], 0 for those that do not move.
    """

    mask: UInt8[Array | np.ndarray, "*e _ m"]
    row_counts: Float[Array | np.ndarray, "*e n"]
    column_counts: Float[Array | np.ndarray, "*e m"]
    unit: Float[Array | np.ndarray, "*u"]


class Kernels(NamedTuple):
    """The kernels of one layer's pruned linear layers under Adafactor, by name.

    Attributes:
        moving: what steps change.
        fixed: what they do not; see `Fixed`.
    """

    moving: dict[str, Moving]
    fixed: dict[str, Fixed]

    @property
    def values(self) -> dict[str, Any]:
        """Name -> the kernel, with what is masked and moves along."""
        return {name: moving.value for name, moving in self.moving.items()}

    @property
    def masks(self) -> dict[str, Any]:
        """Name -> the bits of its mask."""
        return {name: fixed.mask for name, fixed in self.fixed.items()}


def init(
    kernels: Params,
    dtype: np.dtype,
    experts: Mapping[str, Sequence[int | None]] = MappingProxyType({}),
) -> Kernels:
    """Initializes a layer's pruned kernels before the first step, on the host.

    Args:
        kernels: name -> the kernel; experts' are stacked.
        dtype: of the computation.
        experts: name -> the experts whose kernels are tuned, where they are stacked; the others do
            not move.
    """
    # In one order in memory, which decides how sums are rounded, wherever a run was stopped.
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
    """Returns shapes and dtypes of what `init` makes of a layer's kernels, all but its routers'."""

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
    unit = _unit(value) if value.ndim == 2 else _units(value, tuned)
    return with_mask(unit, np.packbits(value != 0, axis=-2), value)


def with_mask(
    unit: Any, mask: UInt8[np.ndarray, "*e _ m"], value: Float[np.ndarray, "*e n m"]
) -> Fixed:
    """Returns what no step changes of a kernel with such a mask, on the host.

    Args:
        unit: see `Fixed`.
        mask: its bits.
        value: the kernel; what is not zero of it moves.
    """
    moves = value != 0
    return Fixed(mask, moves.sum(-1, dtype=np.float32), moves.sum(-2, dtype=np.float32), unit)


def _unit(value: Float[np.ndarray, "n m"]) -> Any:
    return np.sqrt(np.sum(value**2) / np.float32(max(1, (value != 0).sum())))


def _units(
    values: Float[np.ndarray, "e n m"], tuned: Sequence[int | None]
) -> Float[np.ndarray, "e 1 1"]:
    units = [
        _unit(value) if expert in tuned else np.float32(0) for expert, value in enumerate(values)
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
        kernels: before the step; what is on the device is not to be used again.
        gradients: by the kernels' values; empty when this returns.
        number: the number of the step, from 1.
        rate: the rate of the step.
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
        kernel: before the step.
        fixed: what stays of it.
        gradient: by its values.
        number: of the step, from 1.
        rate: of the step.
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
    # Its mean square, as if the squares of the gradient, too, were of_rows·of_columns / their mean.
    ratios = mean_of(of_rows / rows, fixed.row_counts) * mean_of(
        of_columns / columns, fixed.column_counts
    )
    of_all = jnp.maximum(mean_of(of_rows, fixed.row_counts), EPSILON)
    size = ratios * warm * mean / of_all
    rate = rate * lax.rsqrt(jnp.maximum(1, size))[..., None]
    value = kernel.value.astype(jnp.float32) - rate * fixed.unit * step  # 0 where nothing is kept
    # an expert may have no tokens
    weight = (1 - SHARES_DECAY) * (of_all > 2 * EPSILON).astype(jnp.float32)
    row_shares = kernel.row_shares + weight * (of_rows / of_all - kernel.row_shares)
    column_shares = kernel.column_shares + weight * (of_columns / of_all - kernel.column_shares)
    return Moving(
        _dithered(value, kernel.value.dtype, number), rows, columns, row_shares, column_shares
    )


def _dithered(
    value: Float[Array, "*e n m"], dtype: np.dtype, number: Float[Array, ""]
) -> Float[Array, "*e n m"]:
    """Rounds to a dtype, away from zero or towards it, so that the values of many steps are right
    in the mean."""
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
    # the bits of a NaN may become those of 0
    return jnp.where(jnp.isnan(value), value, kept).astype(dtype)


def _mean(total: Float[Array, "*s"], count: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return total / jnp.maximum(count, 1)


def rounded(
    kernels: Kernels, name: str, dtype: np.dtype, devices: Devices
) -> Float[Array, "*e n m"]:
    """Rounds a kernel to the dtype that it is stored in; every weight that is kept stays other than
    zero."""
    value, mask = devices.shard_outputs((kernels.moving[name].value, kernels.fixed[name].mask))
    return round_kernel(value, unpacked(mask, value.shape[-2]), dtype)


@jax.jit
def kept(value: Float[Array, "*e n m"], mask: UInt8[Array, "*e _ m"]) -> Float[Array, "*e n m"]:
    """Returns a kernel without what is masked of it."""
    return masked(unpacked(mask, value.shape[-2]), value)


def unpacked(bits: UInt8[Array | np.ndarray, "*e _ m"], count: int) -> Bool[Array, "*e n m"]:
    """Returns the mask of so many inputs of its bits."""
    return jnp.unpackbits(bits, axis=-2, count=count).astype(bool)
