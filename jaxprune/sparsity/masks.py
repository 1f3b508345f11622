"""Masks from pruned checkpoints and from files, and the writer of such files.

A mask file is one safetensors file. It has one tensor per pruned linear layer, under the name of
its weight in a Hugging Face checkpoint: the bits of its mask [out, in] (1 = kept), packed along the
inputs, eight per byte, the first in the lowest bit:

    numpy.unpackbits(tensor, axis=1, count=n_in, bitorder="little")

The header's metadata has the shapes [out, in] as JSON.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Bool, UInt8
from safetensors import SafetensorError, safe_open

from convert import Reader, open_checkpoint, part_of, schema
from convert.errors import DamagedError
from convert.files import expand, require_regular
from convert.names import TEXT, Naming
from convert.ownership import EMPTY_CHECKSUM, add_checksum, digest
from convert.paths import paths_of
from convert.shards import TensorFile
from jaxprune.errors import InputError

FORMAT = "jaxprune masks 1"
_Shape = Annotated[list[pydantic.PositiveInt], pydantic.Field(min_length=2, max_length=2)]
LEAST_ZEROS = 0.01
"""Weights with at least this fraction of zeros count as pruned. Dense weights have a few zeros by
chance; a model that was rounded to four bits has 0.04 %."""
FROM_CHECKPOINT, FROM_FILE = "from-checkpoint:", "from-file:"


class StoredMask:
    """The mask of one kernel, read on demand.

    Args:
        shape: [n_in, n_out].
        read: returns the mask, bool [n_in, n_out], True = kept.
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Bool[np.ndarray, "n m"]]) -> None:
        self.shape = shape
        self.read = read


Masks = Callable[[int, str], StoredMask]
"""(layer index, path of the linear layer) -> its mask."""


def is_stored(name: str) -> bool:
    """Returns whether a name refers to existing masks, not to a method."""
    return name.startswith((FROM_CHECKPOINT, FROM_FILE))


def source_of(name: str) -> Path | None:
    """Returns the file or folder that a mask's name refers to; None if there is none on this
    machine."""
    found = (
        paths_of(name.removeprefix(FROM_CHECKPOINT).removeprefix(FROM_FILE))
        if is_stored(name)
        else []
    )
    return found[0] if found else None


def digest_of(name: str) -> str:
    """Returns the SHA-256 of all files that the masks of a name are read from; raises as `load`
    does."""
    if name.startswith(FROM_CHECKPOINT):
        files = sorted(open_checkpoint(name.removeprefix(FROM_CHECKPOINT), check=False).files)
    else:
        files = [expand(name.removeprefix(FROM_FILE))]
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()


def load(name: str) -> Masks:
    """Loads the masks that `from-checkpoint:DIR` or `from-file:FILE` names.

    Raises:
        InputError, CheckpointError: there are no masks, or they cannot be read.
    """
    if name.startswith(FROM_CHECKPOINT):
        path = name.removeprefix(FROM_CHECKPOINT)
        if not path:
            raise InputError(
                f"{FROM_CHECKPOINT} names no checkpoint", options={"mask": f"{FROM_CHECKPOINT}DIR"}
            )
        return from_checkpoint(open_checkpoint(path), path)
    return from_file(expand(name.removeprefix(FROM_FILE)))


def from_checkpoint(
    reader: Reader,
    name: str = "the checkpoint",
    options: Mapping[str, Any] = MappingProxyType(
        {"mask": f"{FROM_CHECKPOINT}DIR of a pruned one"}
    ),
) -> Masks:
    """Returns masks that keep the non-zero weights of a pruned checkpoint.

    Args:
        reader: the reader of the pruned checkpoint.
        name: the checkpoint's name, for errors.
        options: the options to change if the checkpoint is not pruned; see `UserError`.

    Raises:
        InputError: the layers have almost no zeros, so the checkpoint is not pruned.
    """
    every = list(
        dict.fromkeys(part for part in map(part_of, reader.spec) if part.startswith("layers."))
    )
    # a run's rules may have left single layers dense
    some = {every[place] for place in (0, len(every) // 2, -1) if every}
    if (share := max((_share_of_zeros(reader, part) for part in some), default=0.0)) < LEAST_ZEROS:
        raise InputError(
            f"{name} has {100 * share:.2g} % zeros at most in its first, middle and last layer: it "
            "is not pruned, so its zeros cannot be used as masks",
            options=options,
        )

    def mask(index: int, linear: str) -> StoredMask:
        path = f"layers.{index}.{linear}.kernel"
        if path not in reader.spec:
            raise InputError(f"{name}, which provides the mask, has no {path}")
        return StoredMask(
            reader.spec[path].shape, lambda: np.asarray(reader.read([path])[path] != 0)
        )

    return mask


def _share_of_zeros(reader: Reader, part: str) -> float:
    kernels = reader.read(
        [path for path in reader.spec if part_of(path) == part and path.endswith(".kernel")]
    )
    zeros, size = (
        sum(count(a) for a in kernels.values())
        for count in (lambda a: int((a == 0).sum()), np.size)
    )
    return zeros / max(1, size)


class _Metadata(schema.Schema):
    """The metadata in a mask file's header: the shapes [out, in] of the masks."""

    shapes: pydantic.Json[dict[str, _Shape]]


def from_file(file: Path) -> Masks:
    """Opens the masks of a file that `MaskWriter` wrote.

    Raises:
        InputError: the file is not a mask file.
        DamagedError: the header and the tensors disagree. Reading a mask raises it too, if bits
            beyond the mask's inputs are set.
    """
    require_regular(file, InputError)
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            packed = {name: opened.get_slice(name) for name in opened.keys()}
            packed_as = {name: (one.get_dtype(), one.get_shape()) for name, one in packed.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"it cannot be read ({error})", file=file) from error
    if metadata.get("format") != FORMAT:
        raise InputError("it has no masks", file=file, wanted="a mask file of a run")
    header = schema.check(_Metadata, metadata, file=file, entry="__metadata__")
    shapes = {name: (out, n) for name, (out, n) in header.shapes.items()}
    wanted = {name: ("U8", _packed_shape(shape)) for name, shape in shapes.items()}
    if bad := sorted(
        n for n in packed_as.keys() | wanted.keys() if packed_as.get(n) != wanted.get(n)
    ):
        raise DamagedError(f"its masks and their shapes disagree: {', '.join(bad[:5])}", file=file)

    names = {f"layers.{name.partition('layers.')[2]}": name for name in shapes}

    def mask(index: int, linear: str) -> StoredMask:
        name = names.get(f"layers.{index}.{linear}.weight")
        if name is None:
            one = f"layers.{index}.{linear}"
            raise InputError(
                f"it has no mask for {one}: it was made for another model, or by a run that left "
                "this layer dense",
                file=file,
                options={"skip": f"{one} and whatever else was"},
            )
        out, n = shapes[name]

        def read() -> Bool[np.ndarray, "n m"]:
            with safe_open(file, framework="numpy") as opened:
                bits = opened.get_tensor(name)
            if n % 8 and (bits[:, -1] >> (n % 8)).any():
                raise DamagedError(f"bits are set beyond the {n} inputs", file=file, entry=name)
            return unpack(bits, n)

        return StoredMask((n, out), read)

    return mask


class MaskWriter:
    """Writes the masks of a run's linear layers, one decoder layer at a time.

    Args:
        path: the file to create.
        shapes: (layer index, path of the linear layer) -> [n_in, n_out] of its kernel.
        naming: the names of the checkpoint's tensors.

    Raises:
        CheckpointError: the disk has no space for the file.
    """

    def __init__(
        self, path: Path, shapes: Mapping[tuple[int, str], tuple[int, ...]], naming: Naming = TEXT
    ) -> None:
        self._naming = naming
        stored = {_name(*which, naming): (shape[1], shape[0]) for which, shape in shapes.items()}
        spec = {
            n: jax.ShapeDtypeStruct(tuple(_packed_shape(s)), np.dtype(np.uint8))
            for n, s in stored.items()
        }
        self._file = TensorFile(
            path, spec, {"checksum": EMPTY_CHECKSUM, "format": FORMAT, "shapes": json.dumps(stored)}
        )
        self._path = path

    def write(self, index: int, masks: Mapping[str, UInt8[np.ndarray, "m _"]]) -> None:
        """Writes the packed masks of one layer, in the form of `LayerResult`."""
        for linear, packed in masks.items():
            self._file.write(_name(index, linear, self._naming), packed)

    def finish(self) -> None:
        """Completes the file and writes its checksum; see `ownership`.

        Raises:
            CheckpointError: some masks were never written.
        """
        self._file.finish()
        add_checksum(self._path)


@jax.jit
def pack(mask: Bool[Array, "n m"]) -> UInt8[Array, "m _"]:
    """Packs the bits of a mask [n_in, n_out] in a mask file's layout: [n_out, ceil(n_in / 8)]."""
    return jnp.packbits(mask.T, axis=1, bitorder="little")


def unpack(packed: UInt8[np.ndarray, "m _"], n: int) -> Bool[np.ndarray, "n m"]:
    """Unpacks a mask [n_in, n_out] from its packed bits."""
    return np.unpackbits(packed, axis=1, count=n, bitorder="little").T.astype(bool)


def _name(index: int, linear: str, naming: Naming) -> str:
    return naming.hf_name(f"layers.{index}.{linear}.kernel")


def _packed_shape(shape: tuple[int, int]) -> list[int]:
    """Returns the shape of the packed bits of a mask [out, in]."""
    return [shape[0], -(-shape[1] // 8)]
