"""The devices of a run as one mesh, and how arrays lie on it.

Windows are sharded over the mesh, params are replicated, solves are sharded over outputs.
Everything that goes to the devices or comes back goes through here. With several hosts each process
runs the same program on the same host arrays and gives its own devices their shards; what comes
back is gathered on every host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxprune.errors import Change, InputError

AXIS = "devices"
MOST_DEVICES = 256
"""Most devices of a process. A CPU can be divided into any number of them, each of which takes
memory and threads."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a run uses.

    Attributes:
        mesh: a mesh of one axis, over all of them; None: one device alone, where nothing is
            sharded.
        device: that one, where programs are compiled for it and it need not be there; None: JAX's
            default device.
    """

    mesh: Mesh | None = None
    device: jax.Device | None = None

    @classmethod
    def first(cls, count: int | None = None) -> "Devices":
        """Returns the first devices that JAX finds.

        Args:
            count: how many; None: all there are, of all hosts.

        Raises:
            InputError: there are fewer.
        """
        there = jax.devices()
        if count is not None and not 1 <= count <= len(there):
            found = ", ".join(map(str, there[:8]))
            raise InputError(
                f"JAX finds {len(there)} devices ({found}), not {count}",
                options={"devices": len(there)},
            )
        if jax.process_count() > 1 and count not in (None, len(there)):
            raise InputError(
                f"several processes use all their devices, {len(there)}, not {count}",
                options={"devices": Change.OMIT},
            )
        chosen = there[: count or len(there)]
        return cls(
            Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))
            if len(chosen) > 1
            else None
        )

    @property
    def count(self) -> int:
        """Number of devices in use."""
        return self.mesh.size if self.mesh else 1

    @property
    def processes(self) -> list[int]:
        """The process of each device in use."""
        return (
            [device.process_index for device in self.mesh.devices.flat]
            if self.mesh
            else [jax.process_index()]
        )

    def replicate(self, tree: Any) -> Any:
        """Puts arrays on every device, whole."""
        return self._put(tree, PartitionSpec()) if self.mesh else jax.device_put(tree)

    def shard_first(self, tree: Any) -> Any:
        """Shards the first axis of arrays, windows or experts, over the devices; replicates those
        that cannot be."""
        return jax.tree.map(lambda array: self._shard(array, 0), tree)

    def assemble_first(
        self, shape: tuple[int, ...], dtype: np.dtype, part: Callable[[slice], np.ndarray]
    ) -> jax.Array:
        """Puts an array on the devices as `shard_first` does, of which each process has the parts
        of its own.

        Args:
            shape: of the whole.
            dtype: of the whole.
            part: rows -> what they hold.
        """
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, self._spec(shape, 0))
        return jax.make_array_from_callback(
            shape, sharding, lambda index: part(index[0]), dtype=dtype
        )

    def shard_outputs(self, tree: Any) -> Any:
        """Shards the last axis of arrays over the devices; replicates arrays that cannot be split
        evenly."""
        return jax.tree.map(lambda array: self._shard(array, -1), tree)

    def abstract(self, shape: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
        """Returns a shape with the sharding that an array of it gets; `axis` is sharded, None: it
        is replicated."""
        if self.mesh is None:
            return _placed(shape, self.device)
        sharding = NamedSharding(self.mesh, self._spec(shape.shape, axis))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def _shard(self, array: Any, axis: int) -> Any:
        if self.mesh is None:
            return jax.device_put(array)
        return self._put(array, self._spec(array.shape, axis))

    def _spec(self, shape: tuple[int, ...], axis: int | None) -> PartitionSpec:
        if axis is None or not shape or shape[axis] % self.count:
            return PartitionSpec()
        names: list[str | None] = [None] * len(shape)
        names[axis] = AXIS
        return PartitionSpec(*names)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda array: _put_globally(array, sharding), tree)


ONE_DEVICE = Devices()
"""JAX's default device alone."""


def fetch(tree: Any) -> Any:
    """Returns arrays in host memory, whole, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_gather, tree)


def _placed(shape: jax.ShapeDtypeStruct, device: jax.Device | None) -> jax.ShapeDtypeStruct:
    return (
        shape
        if device is None
        else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(device))
    )


def _same(array: jax.Array) -> jax.Array:
    """Returns the array: one function, so that it is compiled once a shape."""
    return array


def _put_globally(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        return jax.jit(_same, out_shardings=sharding)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _gather(array: Any) -> np.ndarray:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
