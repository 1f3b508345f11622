"""safetensors files written in place: headers first, then tensors in any order, so that memory
stays flat.

The safetensors library writes a file from a whole dictionary of arrays; here a tensor is written
when it is ready and forgotten. The files are planned from shapes alone and their disk space is
reserved at the start, so a disk that is too small is known before any work.

References:
    https://huggingface.co/docs/safetensors (format: 8 bytes of header length, JSON header, tensor
    bytes).
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from convert.checkpoint import require_written
from convert.errors import CheckpointError
from convert.writing import failing, reserve, sync, write_text

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORED = DTYPES | {"bool": "BOOL"}
STORED |= {
    f"{kind}int{bits}": f"{sign}{bits}"
    for kind, sign in (("", "I"), ("u", "U"))
    for bits in (8, 16, 32, 64)
}
MAX_SHARD_SIZE = 5_000_000_000
INDEX = "model.safetensors.index.json"


class TensorFile:
    """One safetensors file, its space reserved, into which tensors are written at their places.

    Args:
        path: the path of the file; its folder exists.
        spec: name -> what has the shape and the dtype of each tensor.
        metadata: strings for the header.

    Attributes:
        path: as given.

    Raises:
        CheckpointError: not enough disk space.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self.path, self._spec = path, spec
        self._written: set[str] = set()
        # Wide dtypes first: every tensor then starts at a multiple of its item size.
        names = sorted(spec, key=lambda name: (-spec[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        starts, end = {}, 0
        for name in names:
            tensor = spec[name]
            starts[name], end = end, end + _nbytes(tensor)
            header[name] = {
                "dtype": STORED[tensor.dtype.name],
                "shape": tensor.shape,
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}
        size = 8 + len(text) + end
        with failing(path):
            path.write_bytes(struct.pack("<Q", len(text)) + text)
        reserve(path, size)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor at its place."""
        tensor = self._spec[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} was announced as {tensor.dtype.name}{list(tensor.shape)} but is "
                f"{array.dtype.name}{list(array.shape)}"
            )
        self._put(self._starts[name], array)
        self._written.add(name)

    def write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from the first one's index on; the last ones make it whole."""
        self._put(self._starts[name] + first * _nbytes(rows) // len(rows), rows)
        if first + len(rows) == self._spec[name].shape[0]:
            self._written.add(name)

    def _put(self, start: int, array: np.ndarray) -> None:
        with failing(self.path), self.path.open("r+b") as file:
            file.seek(start)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Makes sure that every tensor was written and is on the disk.

        Raises:
            CheckpointError: some were not.
        """
        require_written(self._spec.keys() - self._written, self.path)
        with failing(self.path):
            sync(self.path)


class ShardWriter:
    """Writes tensors under their names in a checkpoint, as model.safetensors or as shards with an
    index.

    Args:
        folder: an empty folder.
        spec: checkpoint name -> shape and dtype of each tensor.
        max_shard_size: bytes.

    Raises:
        CheckpointError: not enough disk space.
    """

    def __init__(
        self,
        folder: Path,
        spec: dict[str, jax.ShapeDtypeStruct],
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> None:
        plan = split_state_dict_into_shards_factory(
            spec,
            get_storage_size=_nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._files: dict[str, TensorFile] = {}
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: spec[name] for name in names}
            made = TensorFile(folder / file, tensors, {"format": "pt"})
            self._files |= dict.fromkeys(names, made)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor at its place."""
        self._files[name].write(name, array)

    def finish(self) -> None:
        """Raises CheckpointError if a tensor was never written."""
        for file in dict.fromkeys(self._files.values()):
            file.finish()


def _nbytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
