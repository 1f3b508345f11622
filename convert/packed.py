"""Pruned checkpoints on less disk: of kernels with zeros the places and values of the others, all
else as it is.

`packed.json` says of each tensor how it lies in the folder `packed`, in one safetensors file a part
(a decoder layer, the embedding, ...); README.md in the folder describes that to whoever has no
jaxprune. `packing` has the codes, and `planes` what zstd does with them.
"""

import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from pydantic import Field

from convert import packing, planes, schema
from convert.assets import check_files, read_config
from convert.checkpoint import (
    Params,
    Spec,
    parts,
    require_written,
    transposed,
    transposed_shape,
)
from convert.checkpoint import Reader as AnyReader
from convert.consistency import ordered
from convert.errors import Change, CheckpointError, DamagedError, joined
from convert.files import open_regular, require_inside
from convert.names import flax_path, naming_in, naming_of
from convert.packing import Groups, Mask, Places
from convert.safetensors_header import Stored, header
from convert.schema import Schema
from convert.shards import DTYPES, TensorFile
from convert.writing import write_text

MARK, FOLDER = "packed.json", "packed"
LEVEL = 3
"""Of zstd, where none is asked for."""
SAMPLED = 2**20
"""Elements of a tensor of which `estimated_bytes` packs all."""


class _Whole(Schema):
    kind: Literal["whole"] = "whole"


class _Tensor(Schema):
    """How a tensor lies in its file.

    Attributes:
        file: relative path of the file.
        dtype: of the tensor.
        shape: of the tensor; a kernel's is [out, in].
        layout: `whole`, or places and values.
        sha256: of the tensor's bytes in a checkpoint that is not packed: little-endian, in C order.
    """

    file: Annotated[
        str, Field(pattern=rf"^{FOLDER}/[A-Za-z0-9_-]{{1,200}}(\.[0-9]{{1,4}})?\.safetensors$")
    ]
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2**40)], ...], Field(max_length=8, strict=False)
    ]
    layout: Annotated[_Whole | Mask | Groups, Field(discriminator="kind")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @property
    def places(self) -> Places | None:
        """Where the values are; None: everywhere."""
        return None if isinstance(self.layout, _Whole) else self.layout

    def arrays(self, name: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns name -> shape and dtype of the arrays that make the tensor; those of the places
        come first."""
        dtype, places = np.dtype(self.dtype), self.places
        if places is None:
            return {name: (self.shape, dtype)}
        if len(self.shape) != 2 or (isinstance(places, Groups) and not places.fits(self.matrix)):
            raise DamagedError(
                "its layout does not fit its shape", entry=name, found=list(self.shape)
            )
        where = (places.nbytes(self.matrix),), np.dtype(np.uint8)
        return {f"{name}.places": where, f"{name}.values": ((places.count(self.matrix),), dtype)}

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of what has places."""
        rows, columns = self.shape
        return rows, columns


class _Index(Schema):
    """packed.json."""

    format: Literal["jaxprune packed"] = "jaxprune packed"
    version: Literal[1] = 1
    tensors: dict[Annotated[str, Field(max_length=500)], _Tensor]


class Reader:
    """Reads a folder that this module's Writer wrote.

    Args:
        path: the folder.

    Raises:
        CheckpointError: it is incomplete or damaged; all that is, in one message.
    """

    def __init__(self, path: Path) -> None:
        self.assets = path
        config = read_config(path)
        check_files(path)
        tensors = schema.read(_Index, path / MARK).tensors
        naming = naming_of(config, tensors)
        self._headers = {
            file: self._header(file)
            for file in sorted({tensor.file for tensor in tensors.values()})
        }
        self._tensors: dict[str, tuple[str, _Tensor]] = {}
        problems = []
        for name, tensor in tensors.items():
            try:
                for array, (shape, dtype) in tensor.arrays(name).items():
                    planes.tensors_of(array, shape, dtype, self._headers[tensor.file])
            except DamagedError as error:
                problems.append(str(error))
            param = flax_path(naming.bare(name), len(tensor.shape))
            if param in self._tensors:
                problems.append(f"{self._tensors[param][0]} and {name} are two names for one param")
            self._tensors[param] = name, tensor
        if problems:
            raise DamagedError(f"it is incomplete or damaged: {joined(problems)}", file=path)
        spec = {
            param: jax.ShapeDtypeStruct(
                transposed_shape(param, tensor.shape), np.dtype(tensor.dtype)
            )
            for param, (_, tensor) in self._tensors.items()
        }
        self.spec = ordered(spec, path)
        self.files = [path / file for file in self._headers]

    def _header(self, file: str) -> dict[str, Stored]:
        require_inside(self.assets / file, self.assets)
        return header(self.assets / file)

    @staticmethod
    def accepts(path: Path) -> bool:
        return os.path.lexists(path / MARK)

    def stored_bytes(self, path: str) -> int:
        """Returns the bytes that a param takes in its file."""
        name, tensor = self._tensors[path]
        stored = self._headers[tensor.file]
        arrays = tensor.arrays(name).items()
        return sum(
            stored[part].nbytes
            for array, whole in arrays
            for part in planes.tensors_of(array, *whole, stored)
        )

    def read(self, paths: Iterable[str]) -> Params:
        return {path: self._read(path) for path in paths}

    def _read(self, path: str) -> np.ndarray:
        name, tensor = self._tensors[path]
        file, stored = self.assets / tensor.file, self._headers[tensor.file]
        try:
            with open_regular(file) as opened:
                arrays = [
                    planes.join(opened, array, *whole, stored)
                    for array, whole in tensor.arrays(name).items()
                ]
            array = arrays[-1]
            if tensor.places:
                array = packing.unpack(arrays[0], array, tensor.places, tensor.matrix)
        except (OSError, ValueError) as error:
            raise DamagedError(f"it cannot be read ({error})", file=file, entry=name) from error
        if _digest(array) != tensor.sha256:
            raise DamagedError("it is not what was packed", file=file, entry=name)
        return transposed(path, array)


class Writer:
    """Writes one safetensors file a part, and the index at the end.

    Args:
        folder: an empty folder.
        spec: the shapes and dtypes of what will be written.
        assets: the folder of the checkpoint's configuration.
        zstd: level of zstd, 1 to 22, at which planes of bytes are compressed; 0: none is.
    """

    def __init__(self, folder: Path, spec: Spec, assets: Path, *, zstd: int = LEVEL) -> None:
        if zstd not in planes.LEVELS:
            problem = f"zstd has levels up to {planes.LEVELS[-1]}, not {zstd}"
            raise CheckpointError(problem, options={"zstd": Change.OTHER})
        self.place, self._spec, self._level = folder, spec, zstd
        self._naming = naming_in(read_config(assets), spec)
        self._tensors: dict[str, _Tensor] = {}
        self.files: set[str] = set()

    @staticmethod
    def require_suitable(reader: AnyReader) -> None:
        """Raises CheckpointError where no kernel would become smaller, of a checkpoint that is not
        pruned."""
        for path in reader.spec:
            if path.endswith(".kernel") and packing.places_of(reader.read([path])[path].T):
                return
        raise CheckpointError(
            "packed it would be larger, for none of its kernels has zeros enough: it is not pruned"
        )

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for part, paths in parts(params).items():
            file = f"{FOLDER}/{part}.safetensors"
            arrays: dict[str, np.ndarray] = {}
            for path in paths:
                name = self._naming.hf_name(path)
                array = np.ascontiguousarray(transposed(path, params[path]))
                places = _places_of(path, array)
                self._tensors[name] = _Tensor(
                    file=file,
                    dtype=array.dtype.name,
                    shape=array.shape,
                    layout=places or _Whole(),
                    sha256=_digest(array),
                )
                for key, one in zip(
                    self._tensors[name].arrays(name), _parts(array, places), strict=True
                ):
                    arrays |= planes.split(key, one, self._level)
            (self.place / FOLDER).mkdir(exist_ok=True)
            spec = {
                key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in arrays.items()
            }
            tensors = TensorFile(self.place / file, spec, {})
            for key, array in arrays.items():
                tensors.write(key, array)
            tensors.finish()
            self.files.add(file)

    def finish(self) -> None:
        require_written(
            set(map(self._naming.hf_name, self._spec)) - self._tensors.keys(), self.place
        )
        index = _Index(tensors=self._tensors)
        write_text(self.place / MARK, index.model_dump_json(indent=1) + "\n")
        write_text(self.place / "README.md", Path(__file__).with_suffix(".md").read_text("utf-8"))
        self.files |= {MARK, "README.md"}


def estimated_bytes(params: Params) -> int:
    """Returns about how many bytes params take packed, without what the files say of them.

    Of a tensor with more than `SAMPLED` elements some rows, evenly spaced, stand for all.

    Args:
        params: params of a checkpoint.
    """
    total = 0.0
    for path, param in params.items():
        array = transposed(path, param)
        some = np.ascontiguousarray(
            array[:: -(-array.size // SAMPLED)] if array.size > SAMPLED else array
        )
        places = _places_of(path, some)
        arrays = [
            one for part in _parts(some, places) for one in planes.split("", part, LEVEL).values()
        ]
        total += sum(one.nbytes for one in arrays) * (array.size / max(1, some.size))
    return round(total)


def _parts(array: np.ndarray, places: Places | None) -> tuple[np.ndarray, ...]:
    """Returns the arrays that make a tensor."""
    return (array,) if places is None else packing.pack(array, places)


def _digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order."""
    return sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _places_of(path: str, array: np.ndarray) -> Places | None:
    """Returns how a tensor takes the fewest bytes; None: as it is, as all but kernels are."""
    return packing.places_of(array) if path.endswith(".kernel") else None
