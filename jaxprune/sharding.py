"""The devices of a run as one mesh: windows are split over it, params are on all of it, solves are split over outputs.

Everything that goes to the devices or comes back goes through here. With one device nothing is sharded. With several
hosts each process runs the same program on the same host arrays and gives its own devices their shares; what comes back
is gathered on every host.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune.errors import Change, InputError

AXIS = "devices"
MOST_DEVICES = 256
"""Of a process. A CPU can be divided into any number of them, each of which takes memory and threads."""
_mesh: Mesh | None = None


def use(count: int | None) -> None:
    """Makes runs use so many devices; None: all there are, of all hosts.

    Raises:
        InputError: there are fewer.
    """
    global _mesh
    there = jax.devices()
    if count is not None and not 1 <= count <= len(there):
        found = ", ".join(map(str, there[:8]))
        raise InputError(f"JAX finds {len(there)} devices ({found}), not {count}", options={"devices": len(there)})
    if jax.process_count() > 1 and count not in (None, len(there)):
        raise InputError(
            f"several processes use all their devices, {len(there)}, not {count}", options={"devices": Change.OMIT}
        )
    chosen = there[: count or len(there)]
    _mesh = Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,)) if len(chosen) > 1 else None


def number() -> int:
    """Number of devices in use."""
    return _mesh.size if _mesh else 1


def cuda_capability() -> float:
    """The compute capability of this process's GPUs, such as 8.6; 0 where they are not NVIDIA's, or there are none."""
    text = getattr(jax.local_devices()[0], "compute_capability", "")  # AMD's say gfx942 and the like
    return float(text) if text.replace(".", "").isdigit() else 0.0


def everywhere(tree: Any) -> Any:
    """Arrays on every device, whole."""
    return _put(tree, PartitionSpec()) if _mesh else jax.device_put(tree)


def by_windows(tree: Any) -> Any:
    """Arrays whose first axis is split over the devices; on every device where it cannot be split evenly."""
    return jax.tree.map(lambda array: _split(array, 0), tree)


def by_outputs(tree: Any) -> Any:
    """Arrays whose last axis is split over the devices; on every device where it cannot be split evenly."""
    return jax.tree.map(lambda array: _split(array, -1), tree)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """float32 zeros; those of three axes have a share on each device."""
    if _mesh is None:
        return jnp.zeros(shape, jnp.float32)
    spec = PartitionSpec(AXIS) if len(shape) == 3 else PartitionSpec()
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=NamedSharding(_mesh, spec))()


def fetch(tree: Any) -> Any:
    """Arrays in host memory, whole, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_gather, tree)


def like(shape: jax.ShapeDtypeStruct, split: int | None) -> jax.ShapeDtypeStruct:
    """The shape with the sharding that an array of it gets; `split` is the axis, None: on every device."""
    if _mesh is None:
        return shape
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(_mesh, _spec(shape.shape, split)))


def join(coordinator: str, processes: int | None, number: int | None) -> None:
    """Makes this process one of several, each with devices of its own.

    Args:
        coordinator: host:port of the first process; auto: what SLURM, Open MPI or a TPU pod's metadata say.
        processes: how many there are; None: as auto finds.
        number: of this one, from 0; None: as auto finds.

    Raises:
        InputError: the others cannot be reached.
    """
    try:
        jax.distributed.initialize(None if coordinator == "auto" else coordinator, processes, number)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot join the other processes at {coordinator} ({error})", options={"coordinator": Change.OTHER}
        ) from error


def processes() -> int:
    """Number of processes of this run, each with devices of its own."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes what the run leaves behind."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """What the first process has: JSON of up to 64 KiB. All processes must be here."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    buffer = np.zeros(2**16, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0"))


def _split(array: Any, axis: int) -> Any:
    if _mesh is None:
        return jax.device_put(array)
    return _put(array, _spec(array.shape, axis))


def _spec(shape: tuple[int, ...], axis: int | None) -> PartitionSpec:
    if axis is None or not shape or shape[axis] % number():
        return PartitionSpec()
    names: list[str | None] = [None] * len(shape)
    names[axis] = AXIS
    return PartitionSpec(*names)


def _put(tree: Any, spec: PartitionSpec) -> Any:
    assert _mesh is not None
    sharding = NamedSharding(_mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda array: _put_globally(array, sharding), tree)


def _put_globally(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _gather(array: Any) -> np.ndarray:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
