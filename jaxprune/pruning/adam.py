"""The kernels of a layer under Adam, masks fixed: initialization, a step, rounding, and keeping them in a journal.

A kernel's step is in units of the root mean square of its kept weights, so that one rate serves all of
them, and all models.

References:
    Kingma and Ba, "Adam" (arXiv 1412.6980).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from convert import Params
from jaxprune.methods.linalg import masked
from jaxprune.pruning.journal import TUNING, Journal
from jaxprune.pruning.kernel import round_kernel
from jaxprune.sharding import Devices, fetch

BETAS = 0.9, 0.95
"""Of Adam. There are tens of steps, not thousands, so the second moment's memory is short."""
ADAM = optax.scale_by_adam(*BETAS)


class Kernels(NamedTuple):
    """The kernels of one layer's pruned linear layers under Adam, by name.

    Attributes:
        values: [n, m] float32, or experts' stacked, [e, n, m].
        masks: bits of the nonzero values, eight outputs a byte, [n, ceil(m / 8)].
        units: root mean squares of the kept weights; of experts one each, [e, 1, 1], 0 for those that stay as they are.
        moments: Adam's.
    """

    values: dict[str, Float[Array | np.ndarray, "*e n m"]]
    masks: dict[str, UInt8[Array | np.ndarray, "*e n _"]]
    units: dict[str, Float[Array | np.ndarray, "*u"]]
    moments: Any


class Moving(NamedTuple):
    """What a step changes of one kernel; see `Kernels` and `optax.ScaleByAdamState`."""

    value: Float[Array | np.ndarray, "*e n m"]
    mu: Float[Array | np.ndarray, "*e n m"]
    nu: Float[Array | np.ndarray, "*e n m"]


def init(kernels: Params, experts: Mapping[str, Sequence[int | None]] = MappingProxyType({})) -> Kernels:
    """Initializes a layer's pruned kernels before the first step, on the host.

    Args:
        kernels: name -> the kernel; experts' are stacked.
        experts: name -> the experts whose kernels are tuned, where they are stacked; the others stay as they are.
    """
    values = {name: kernel.astype(np.float32) for name, kernel in kernels.items()}
    masks = {name: np.packbits(value != 0, axis=-1) for name, value in values.items()}
    units = {name: _unit(value) if value.ndim == 2 else _units(value, experts[name]) for name, value in values.items()}
    return Kernels(values, masks, units, jax.device_get(ADAM.init(values)))


def _unit(value: Float[np.ndarray, "n m"]) -> Any:
    return np.sqrt(np.sum(value**2) / np.float32(max(1, (value != 0).sum())))


def _units(values: Float[np.ndarray, "e n m"], tuned: Sequence[int | None]) -> Float[np.ndarray, "e 1 1"]:
    units = [_unit(value) if expert in tuned else np.float32(0) for expert, value in enumerate(values)]
    return np.array(units, np.float32)[:, None, None]


def step(kernels: Kernels, gradients: dict[str, Float[Array, "*e n m"]], rate: Float[Array, ""]) -> Kernels:
    """Takes a step along the gradients, kernel by kernel: the moments of one visit the device at a time.

    Args:
        kernels: before the step; what is on the device is not to be used again.
        gradients: by the kernels' values; empty when this returns.
        rate: the rate of the step.
    """
    values, mu, nu = dict(kernels.values), dict(kernels.moments.mu), dict(kernels.moments.nu)
    count = kernels.moments.count
    for name in values:
        moving = Moving(values[name], mu[name], nu[name])
        moved = step_one(moving, kernels.masks[name], kernels.units[name], gradients.pop(name), count, rate)
        values[name], mu[name], nu[name] = moved
    moments = kernels.moments._replace(count=np.asarray(np.asarray(count) + np.int32(1)), mu=mu, nu=nu)
    return kernels._replace(values=values, moments=moments)


@partial(jax.jit, donate_argnums=0)
def step_one(
    kernel: Moving,
    bits: UInt8[Array, "*e n _"],
    unit: Float[Array, "*u"],
    gradient: Float[Array, "*e n m"],
    count: Int[Array, ""],
    rate: Float[Array, ""],
) -> Moving:
    """Takes a step with one kernel.

    Args:
        kernel: before the step.
        bits: its mask.
        unit: of its step.
        gradient: by its values.
        count: steps before this one.
        rate: of the step.
    """
    state = optax.ScaleByAdamState(count, kernel.mu, kernel.nu)
    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction mixes integers and floats
        update, moments = ADAM.update(masked(_unpacked(bits, gradient.shape[-1]), gradient), state)
    return Moving(kernel.value - rate * unit * update, moments.mu, moments.nu)


def rounded(kernels: Kernels, name: str, dtype: np.dtype, devices: Devices) -> Float[Array, "*e n m"]:
    """Rounds a kernel to the dtype that it is stored in; every weight that is kept stays other than zero."""
    return round_kernel(devices.shard_outputs(kernels.values[name]), _kept(kernels, name), dtype)


class Saved:
    """The kernels of a tuning in a run's journal.

    Args:
        journal: the journal of the run; None: nothing is kept.
        count: the number of layers.
    """

    def __init__(self, journal: Journal | None, count: int) -> None:
        self._journal, self._count = journal, count

    def keep(self, step: int, state: Sequence[Kernels], divergences: Sequence[float]) -> None:
        """Keeps the state before a step, if the work since the last time was long enough."""
        size = sum(leaf.nbytes for kernels in state for leaf in jax.tree.leaves((kernels.values, kernels.moments)))
        if not (self._journal and self._journal.worth_keeping(size)):
            return
        with self._journal.keeping():
            for index, kernels in enumerate(state):
                arrays = dict(zip(_names(kernels), jax.tree.leaves(fetch(_moving(kernels))), strict=True))
                self._journal.put(f"{TUNING}/{step}/{index}", arrays, {"divergences": list(divergences)})
            self._journal.wait()
        for other in self._journal.names(TUNING):
            if other != str(step):
                self._journal.drop(f"{TUNING}/{other}")

    def restore(self, state: list[Kernels], place: Callable[[Kernels], Kernels]) -> tuple[int, list[float]]:
        """Restores the state before the step to go on with; returns its number, and the divergences of its epoch."""
        if not self._journal:
            return 0, []
        for step in sorted(map(int, self._journal.names(TUNING)), reverse=True):
            entries = [self._journal.get(f"{TUNING}/{step}/{index}") for index in range(self._count)]
            if all(entries):
                divergences: list[float] = []
                for index, entry in enumerate(filter(None, entries)):
                    leaves = [entry.arrays[name] for name in _names(state[index])]
                    structure = jax.tree.structure(_moving(state[index]))
                    values, moments = jax.tree.unflatten(structure, leaves)
                    state[index] = place(state[index]._replace(values=values, moments=moments))
                    divergences = entry.metadata["divergences"]
                return step, divergences
        return 0, []


def _moving(kernels: Kernels) -> tuple[dict[str, Any], Any]:
    return kernels.values, kernels.moments


def _names(kernels: Kernels) -> list[str]:
    """Returns the names of the leaves of `_moving`: numbers, for moments have no names of their own."""
    return [f"leaf{index}" for index, _ in enumerate(jax.tree.leaves(_moving(kernels)))]


def _kept(kernels: Kernels, name: str) -> Bool[Array, "*e n m"]:
    return _unpacked(kernels.masks[name], kernels.values[name].shape[-1])


def _unpacked(bits: UInt8[Array | np.ndarray, "*e n _"], count: int) -> Bool[Array, "*e n m"]:
    return jnp.unpackbits(bits, axis=-1, count=count).astype(bool)
