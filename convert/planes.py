"""The bytes of an array in a safetensors file: as they are, or those that zstd makes smaller in
planes.

Plane k holds byte k of every element, the least significant first: those of a float's sign and
exponent are much alike, those of its mantissa not. Of an array `x`, the file holds `x`, or for each
k a tensor of bytes: `x.plane<k>` as it is, or `x.plane<k>.zst`, one zstd frame.
"""

from collections.abc import Mapping
from io import BufferedReader

import numpy as np
from jaxtyping import UInt8

from convert.errors import DamagedError
from convert.safetensors_header import Stored
from convert.shards import STORED
from convert.zstd import zstd

PAYS = 0.97
"""A plane is compressed where no more than this share of it remains."""
MOST_RATIO = 1000
"""How many times larger than a frame its plane may be: a file cannot ask for more memory than
that."""
LEVELS = range(0, 23)
"""Of zstd; 0: nothing is compressed."""


def split(name: str, array: np.ndarray, level: int) -> dict[str, np.ndarray]:
    """Returns the tensors that hold an array.

    Args:
        name: the array's.
        array: in C order.
        level: of zstd; 0: the array as it is.
    """
    if not level:
        return {name: array}
    found: dict[str, np.ndarray] = {}
    for number, plane in enumerate(array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T):
        plane = np.ascontiguousarray(plane)
        frame = zstd.compress(plane, level)
        pays = len(frame) <= PAYS * plane.size and plane.size <= MOST_RATIO * len(frame)
        key = f"{name}.plane{number}"
        found[f"{key}.zst" if pays else key] = np.frombuffer(frame, np.uint8) if pays else plane
    return found if any(key.endswith(".zst") for key in found) else {name: array}


def tensors_of(
    name: str, shape: tuple[int, ...], dtype: np.dtype, stored: Mapping[str, Stored]
) -> tuple[str, ...]:
    """Returns the names of the tensors that hold an array: its own, or one a plane.

    Args:
        name: the array's.
        shape: the array's.
        dtype: the array's.
        stored: the tensors of the file.

    Raises:
        DamagedError: one is missing, or cannot hold it.
    """
    if name in stored:
        if (stored[name].dtype, stored[name].shape) != (STORED[dtype.name], shape):
            raise DamagedError("a tensor is another than the index says", entry=name)
        return (name,)
    count = int(np.prod(shape, dtype=np.int64))
    planes = []
    for number in range(dtype.itemsize):
        plane = f"{name}.plane{number}"
        if plane in stored:
            fits = stored[plane].shape == (count,)
        elif (plane := f"{plane}.zst") in stored:
            fits = len(stored[plane].shape) == 1 and count <= MOST_RATIO * stored[plane].shape[0]
        else:
            raise DamagedError("a tensor is missing", entry=name)
        if stored[plane].dtype != "U8" or not fits:
            raise DamagedError("a tensor is another than the index says", entry=plane)
        planes.append(plane)
    return tuple(planes)


def join(
    file: BufferedReader,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    stored: Mapping[str, Stored],
) -> np.ndarray:
    """Returns an array.

    Args:
        file: open.
        name: the array's.
        shape: the array's.
        dtype: the array's.
        stored: the tensors of the file.

    Raises:
        DamagedError: see `tensors_of`.
        ValueError: a frame is none, or holds something else.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if name in stored:
        return _read(file, stored[name]).view(dtype).reshape(shape)
    planes = np.empty((count, dtype.itemsize), np.uint8)
    for number, plane in enumerate(tensors_of(name, shape, dtype, stored)):
        content = _read(file, stored[plane])
        planes[:, number] = _decompressed(content, count) if plane.endswith(".zst") else content
    return planes.reshape(-1).view(dtype).reshape(shape)


def _read(file: BufferedReader, stored: Stored) -> UInt8[np.ndarray, "_"]:
    file.seek(stored.start)
    found = np.fromfile(file, np.uint8, stored.nbytes)
    if len(found) < stored.nbytes:
        raise ValueError(f"it ends after {len(found)} bytes of {stored.nbytes}")
    return found


def _decompressed(frame: UInt8[np.ndarray, "_"], nbytes: int) -> UInt8[np.ndarray, "_"]:
    decompressor = zstd.ZstdDecompressor()
    try:
        found = decompressor.decompress(frame, max_length=nbytes + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"no zstd frame ({str(error)[:100]})") from error
    if len(found) != nbytes or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"a zstd frame of something else than {nbytes} bytes")
    return np.frombuffer(found, np.uint8)
