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


class Kernels(NamedTuple):
    """The kernels of one layer's pruned linear layers under Adam, by name.

    Attributes:
        moving: what steps change.
        masks: bits of the nonzero values, eight inputs a byte, [ceil(n / 8), m]: TPUs unpack them so as they go.
        units: root mean squares of the kept weights; of experts one each, [e, 1, 1], 0 for those that stay as they are.
    """

    moving: dict[str, Moving]
    masks: dict[str, UInt8[Array | np.ndarray, "*e _ m"]]
    units: dict[str, Float[Array | np.ndarray, "*u"]]

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
    masks = {name: np.packbits(value != 0, axis=-2) for name, value in values.items()}
    units = {name: _unit(value) if value.ndim == 2 else _units(value, experts[name]) for name, value in values.items()}
    return Kernels({name: moving_of(value) for name, value in values.items()}, masks, units)


def moving_of(value: Float[Array | np.ndarray, "*e n m"]) -> Moving:
    """Returns a kernel before the first step."""
    *experts, n, m = value.shape
    rows, columns = np.zeros((*experts, n), np.float32), np.zeros((*experts, m), np.float32)
    return Moving(value, np.zeros(value.shape, jnp.bfloat16), rows, columns)


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
        name: step_one(moving, kernels.masks[name], kernels.units[name], gradients.pop(name), number, rate)
        for name, moving in kernels.moving.items()
    }


@partial(jax.jit, donate_argnums=0)
def step_one(
    kernel: Moving,
    bits: UInt8[Array, "*e _ m"],
    unit: Float[Array, "*u"],
    gradient: Float[Array, "*e n m"],
    number: Float[Array, ""],
    rate: Float[Array, ""],
) -> Moving:
    """Takes a step with one kernel.

    Args:
        kernel: before the step.
        bits: its mask.
        unit: of its step.
        gradient: by its values.
        number: of the step, from 1.
        rate: of the step.
    """
    beta, gamma = BETAS
    kept = _unpacked(bits, gradient.shape[-2])
    gradient = masked(kept, gradient.astype(jnp.float32))
    first = beta * kernel.first.astype(jnp.float32) + (1 - beta) * gradient
    square, counts = gradient * gradient, kept.astype(jnp.float32)
    in_row, in_column = jnp.sum(counts, axis=-1), jnp.sum(counts, axis=-2)
    rows = gamma * kernel.rows + (1 - gamma) * _mean(jnp.sum(square, axis=-1), in_row)
    columns = gamma * kernel.columns + (1 - gamma) * _mean(jnp.sum(square, axis=-2), in_column)
    mean = _mean(jnp.sum(rows * in_row, axis=-1, keepdims=True), jnp.sum(in_row, axis=-1, keepdims=True))
    share = columns / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
    second = rows[..., :, None] * share[..., None, :]
    step = (first / (1 - beta**number)) / (jnp.sqrt(second / (1 - gamma**number)) + EPSILON)
    value = kernel.value - rate * unit * step  # 0 where nothing is kept
    return Moving(value, first.astype(jnp.bfloat16), rows, columns)


def _mean(total: Float[Array, "*s"], count: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return total / jnp.maximum(count, 1)


def rounded(kernels: Kernels, name: str, dtype: np.dtype, devices: Devices) -> Float[Array, "*e n m"]:
    """Rounds a kernel to the dtype that it is stored in; every weight that is kept stays other than zero."""
    return round_kernel(devices.shard_outputs(kernels.moving[name].value), _kept(kernels, name), dtype)


def _kept(kernels: Kernels, name: str) -> Bool[Array, "*e n m"]:
    return _unpacked(kernels.masks[name], kernels.moving[name].value.shape[-2])


def _unpacked(bits: UInt8[Array | np.ndarray, "*e _ m"], count: int) -> Bool[Array, "*e n m"]:
    return jnp.unpackbits(bits, axis=-2, count=count).astype(bool)
