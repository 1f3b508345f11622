"""The kernels of a layer under Adam, masks fixed: initialization, a step, rounding.

A kernel's step is in units of the root mean square of its kept weights, so that one rate serves all of
them, and all models.

Adam's state is 2 bytes a weight, beside the weight's own 4: the first moment is bfloat16, and of the second the means
over the kept weights of each row and of each column are there, r and c, of which the moment of a weight is
r_i·c_j / mean. Both moments in float32 would be 8 bytes, and bring nothing; see docs/notes/performance.md.

References:
    Kingma and Ba, "Adam" (arXiv 1412.6980). Shazeer and Stern, "Adafactor" (arXiv 1804.04235), for rows and columns.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float, UInt8

from convert import Params
from jaxprune.methods.linalg import masked
from jaxprune.pruning.kernel import round_kernel
from jaxprune.sharding import Devices

BETAS = 0.9, 0.95
"""Of Adam. There are tens of steps, or a few thousand, so the second moment's memory is short."""
EPSILON = 1e-8
"""Of Adam."""
BYTES = 6
"""Of a weight and its moments; those of rows and columns are few."""


class Moving(NamedTuple):
    """What a step changes of one kernel.

    Attributes:
        value: [n, m] float32, or experts' stacked, [e, n, m].
        first: mean of the gradients.
        rows: mean of their squares over the kept weights of each input.
        columns: over those of each output.
    """

    value: Float[Array | np.ndarray, "*e n m"]
    first: BFloat16[Array | np.ndarray, "*e n m"]
    rows: Float[Array | np.ndarray, "*e n"]
    columns: Float[Array | np.ndarray, "*e m"]


class Fixed(NamedTuple):
    """What no step changes of one kernel.

    Attributes:
        mask: bits of the nonzero values, eight inputs a byte, [ceil(n / 8), m]: TPUs unpack them so as they go.
        rows: how many are kept of each input.
        columns: of each output.
        unit: root mean square of the kept weights; of experts one each, [e, 1, 1], 0 for those that stay as they are.
    """

    mask: UInt8[Array | np.ndarray, "*e _ m"]
    rows: Float[Array | np.ndarray, "*e n"]
    columns: Float[Array | np.ndarray, "*e m"]
    unit: Float[Array | np.ndarray, "*u"]


class Kernels(NamedTuple):
    """The kernels of one layer's pruned linear layers under Adam, by name.

    Attributes:
        moving: what steps change.
        fixed: what they do not.
    """

    moving: dict[str, Moving]
    fixed: dict[str, Fixed]

    @property
    def values(self) -> dict[str, Any]:
        """Name -> the kernel."""
        return {name: moving.value for name, moving in self.moving.items()}


def init(kernels: Params, experts: Mapping[str, Sequence[int | None]] = MappingProxyType({})) -> Kernels:
    """Initializes a layer's pruned kernels before the first step, on the host.

    Args:
        kernels: name -> the kernel; experts' are stacked.
        experts: name -> the experts whose kernels are tuned, where they are stacked; the others stay as they are.
    """
    values = {name: kernel.astype(np.float32) for name, kernel in kernels.items()}
    fixed = {name: _fixed(value, experts[name] if value.ndim == 3 else ()) for name, value in values.items()}
    return Kernels({name: moving_of(value) for name, value in values.items()}, fixed)


def moving_of(value: Float[Array | np.ndarray, "*e n m"]) -> Moving:
    """Returns a kernel before the first step."""
    *experts, n, m = value.shape
    rows, columns = np.zeros((*experts, n), np.float32), np.zeros((*experts, m), np.float32)
    return Moving(value, np.zeros(value.shape, jnp.bfloat16), rows, columns)


def _fixed(value: Float[np.ndarray, "*e n m"], tuned: Sequence[int | None]) -> Fixed:
    kept = value != 0
    unit = _unit(value) if value.ndim == 2 else _units(value, tuned)
    rows, columns = (kept.sum(axis, dtype=np.float32) for axis in (-1, -2))
    return Fixed(np.packbits(kept, axis=-2), rows, columns, unit)


def _unit(value: Float[np.ndarray, "n m"]) -> Any:
    return np.sqrt(np.sum(value**2) / np.float32(max(1, (value != 0).sum())))


def _units(values: Float[np.ndarray, "e n m"], tuned: Sequence[int | None]) -> Float[np.ndarray, "e 1 1"]:
    units = [_unit(value) if expert in tuned else np.float32(0) for expert, value in enumerate(values)]
    return np.array(units, np.float32)[:, None, None]


def step(
    kernels: Kernels, gradients: dict[str, Float[Array, "*e n m"]], number: Float[Array, ""], rate: Float[Array, ""]
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
    beta, gamma = BETAS
    gradient = masked(_unpacked(fixed.mask, gradient.shape[-2]), gradient.astype(jnp.float32))
    first = beta * kernel.first.astype(jnp.float32) + (1 - beta) * gradient
    square = gradient * gradient
    rows = gamma * kernel.rows + (1 - gamma) * _mean(jnp.sum(square, axis=-1), fixed.rows)
    columns = gamma * kernel.columns + (1 - gamma) * _mean(jnp.sum(square, axis=-2), fixed.columns)
    mean = _mean(jnp.sum(rows * fixed.rows, axis=-1, keepdims=True), jnp.sum(fixed.rows, axis=-1, keepdims=True))
    share = columns / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
    second = rows[..., :, None] * share[..., None, :]
    step = (first / (1 - beta**number)) / (jnp.sqrt(second / (1 - gamma**number)) + EPSILON)
    value = kernel.value - rate * fixed.unit * step  # 0 where nothing is kept
    return Moving(value, first.astype(jnp.bfloat16), rows, columns)


def _mean(total: Float[Array, "*s"], count: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return total / jnp.maximum(count, 1)


def rounded(kernels: Kernels, name: str, dtype: np.dtype, devices: Devices) -> Float[Array, "*e n m"]:
    """Rounds a kernel to the dtype that it is stored in; every weight that is kept stays other than zero."""
    value = devices.shard_outputs(kernels.moving[name].value)
    return round_kernel(value, _unpacked(kernels.fixed[name].mask, value.shape[-2]), dtype)


def _unpacked(bits: UInt8[Array | np.ndarray, "*e _ m"], count: int) -> Bool[Array, "*e n m"]:
    return jnp.unpackbits(bits, axis=-2, count=count).astype(bool)
