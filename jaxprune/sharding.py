"""The devices of a run as one mesh, and the sharding of arrays over it.

Windows are sharded over the mesh, params are replicated, and solves are sharded over outputs. All
transfers to and from the devices go through this module. With several hosts, each process runs the
same program on the same host arrays and gives its own devices their shards. Results are gathered on
every host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, make_single_device_sharding

from jaxprune.errors import Change, InputError

AXIS = "devices"
MOST_DEVICES = 256
"""Maximum number of devices of a process. A CPU can be divided into any number of devices, each of
which takes memory and threads."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a run uses.

    Attributes:
        mesh: a mesh of one axis over all devices; None: a single device, without sharding.
        device: the single device to compile programs for, which may be absent; None: JAX's default
            device.
    """

    mesh: Mesh | None = None
    device: jax.Device | None = None

    @classmethod
    def first(cls, count: int | None = None) -> "Devices":
        """Returns the first devices that JAX finds.

        Args:
            count: the number of devices; None: all devices of all hosts.

        Raises:
            InputError: JAX finds fewer devices, or several processes would not use all of theirs.
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
        """The process index of each device in use."""
        return (
            [device.process_index for device in self.mesh.devices.flat]
            if self.mesh
            else [jax.process_index()]
        )

    def replicate(self, tree: Any) -> Any:
        """Copies whole arrays to every device."""
        return self._put(tree, PartitionSpec()) if self.mesh else jax.device_put(tree)

    def shard_first(self, tree: Any) -> Any:
        """Shards the first axis of arrays (windows or experts) over the devices; replicates arrays
        that cannot be split evenly."""
        return jax.tree.map(lambda array: self._shard(array, 0), tree)

    def assemble_first(
        self, shape: tuple[int, ...], dtype: np.dtype, part: Callable[[slice], np.ndarray]
    ) -> jax.Array:
        """Builds an array, sharded as by `shard_first`, from parts that each process has for its
        own devices.

        Args:
            shape: the shape of the whole array.
            dtype: its dtype.
            part: returns the values of a slice of rows.
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
        """Returns a shape with the sharding of an array of that shape.

        Args:
            shape: the shape and dtype.
            axis: the axis to shard; None: the array is replicated.
        """
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
"""JAX's default device."""


def fetch(tree: Any) -> Any:
    """Returns whole arrays in host memory, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_gather, tree)


def _placed(shape: jax.ShapeDtypeStruct, device: jax.Device | None) -> jax.ShapeDtypeStruct:
    if device is None:
        return shape
    sharding = make_single_device_sharding(device)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _same(array: jax.Array) -> jax.Array:
    """Returns the array. As one named function it is compiled only once per shape."""
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
