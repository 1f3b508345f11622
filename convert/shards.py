"""safetensors files written in place: headers first, then tensors in any order, so that memory stays flat.

The safetensors library writes a file from a whole dictionary of arrays; here a tensor is written when it is
ready and forgotten. The files are planned from shapes alone and their disk space is reserved at the start, so
a disk that is too small is known before any work.

References:
    https://huggingface.co/docs/safetensors (format: 8 bytes of header length, JSON header, tensor bytes).
"""

import json
import os
import struct
from pathlib import Path

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from convert import CheckpointError

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MAX_SHARD_SIZE = 5_000_000_000
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Writes tensors under their names in a checkpoint, as model.safetensors or as shards with an index.

    Args:
        folder: an empty folder.
        spec: checkpoint name -> shape and dtype of each tensor.
        max_shard_size: bytes.

    Raises:
        CheckpointError: not enough disk space.
    """

    def __init__(
        self, folder: Path, spec: dict[str, jax.ShapeDtypeStruct], max_shard_size: int = MAX_SHARD_SIZE
    ) -> None:
        plan = split_state_dict_into_shards_factory(
            spec,
            get_storage_size=_nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._spec = spec
        self._place: dict[str, tuple[Path, int]] = {}
        self._written: set[str] = set()
        for filename, names in plan.filename_to_tensors.items():
            self._reserve(folder / filename, names)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _reserve(self, path: Path, names: list[str]) -> None:
        # Wide dtypes first: every tensor then starts at a multiple of its item size.
        names = sorted(names, key=lambda name: (-self._spec[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in names:
            tensor = self._spec[name]
            starts[name], end = end, end + _nbytes(tensor)
            header[name] = {
                "dtype": DTYPES[tensor.dtype.name],
                "shape": tensor.shape,
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            size = file.tell() + end
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
            except OSError as error:
                raise CheckpointError(
                    f"no room for {size / 1e9:.2f} GB in {path.parent}: {error.strerror}; free some space or "
                    "choose another disk"
                ) from error
        for name in names:
            self._place[name] = path, 8 + len(text) + starts[name]

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor at its place."""
        tensor = self._spec[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} was announced as {tensor.dtype.name}{list(tensor.shape)} but is "
                f"{array.dtype.name}{list(array.shape)}"
            )
        path, offset = self._place[name]
        try:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(np.ascontiguousarray(array).tobytes())
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}; free some space, then run again") from error
        self._written.add(name)

    def finish(self) -> None:
        """Makes sure that every tensor was written and is on the disk.

        Raises:
            CheckpointError: some were not.
        """
        if missing := sorted(self._spec.keys() - self._written):
            raise CheckpointError(f"the checkpoint is incomplete, never written: {', '.join(missing[:5])}")
        for path in {path for path, _ in self._place.values()}:
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def _nbytes(tensor: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
