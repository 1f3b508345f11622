"""Headers of safetensors files, read and checked before the library maps the file.

References:
    https://huggingface.co/docs/safetensors (format: 8 bytes of header length, JSON header, tensor
    bytes).
"""

import math
import struct
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from convert.errors import DamagedError
from convert.files import open_regular
from convert.schema import Schema, check, decode

BITS = {
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of an element."""
MOST = 2**25
"""Bytes of a header; a file of a hundred thousand tensors has a third of it."""
Offset = Annotated[int, Field(ge=0, le=2**62)]


class Tensor(Schema):
    """A tensor's entry; the offsets count from the end of the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(max_length=8)]
    data_offsets: Annotated[list[Offset], Field(min_length=2, max_length=2)]


class Stored(NamedTuple):
    """A tensor of a file: dtype as safetensors names it, shape, and where its bytes begin in the
    file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """How many bytes it has there."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def header(path: Path) -> dict[str, Stored]:
    """Returns tensor name -> dtype and shape, in the order of the data, which they fill without a
    gap.

    Raises:
        CheckpointError: it is no regular file.
        DamagedError: its header is damaged, or does not describe the bytes that the file has.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MOST):
            raise DamagedError(
                f"no safetensors file, or cut short: a header of {length} bytes in {size}",
                file=path,
            )
        content = file.read(length)
    entries = decode(content, file=path)
    metadata = entries.pop("__metadata__", {})  # free text, which nothing here reads
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise DamagedError("it holds something else than text", file=path, entry="__metadata__")
    tensors = {name: check(Tensor, entry, file=path, entry=name) for name, entry in entries.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if tensor.dtype not in BITS:
            raise DamagedError("its dtype is unknown", file=path, entry=name, found=tensor.dtype)
        first, last = tensor.data_offsets
        if first != end:
            problem = (
                "its data overlap another tensor's"
                if first < end
                else "there is a gap before its data"
            )
            raise DamagedError(problem, file=path, entry=name)
        bits = math.prod(tensor.shape) * BITS[tensor.dtype]
        if bits != (last - first) * 8:
            problem = f"{tensor.dtype}{tensor.shape} does not fill its {last - first} bytes"
            raise DamagedError(problem, file=path, entry=name)
        end = last
    if end != size - 8 - length:
        problem = (
            f"it is truncated, or has bytes of no tensor: {size} bytes, wanted {8 + length + end}"
        )
        raise DamagedError(problem, file=path)
    begin = 8 + length
    return {
        name: Stored(t.dtype, tuple(t.shape), begin + t.data_offsets[0])
        for name, t in tensors.items()
    }
