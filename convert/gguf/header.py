"""Headers of GGUF files: every count, length and offset is checked against the file's size before
anything is made of it.

The gguf package's reader makes Python objects of each element of each array, and believes what a
damaged file says. Here arrays are passed over, and decoded when they are asked for.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gguf
import numpy as np

from convert.errors import DamagedError
from convert.files import open_regular

FIELDS, TENSORS = 2**16, 2**17
"""The most of each that a header may have; models of a thousand layers have a tenth of it."""
ELEMENTS = 2**22
"""The most strings in all arrays of a header together; vocabularies and their merges have a tenth
of it."""
NAME_BYTES, TEXT_BYTES = 2**16, 2**24
"""Of a name, and of a string."""
DIMS, ALIGNMENT = 4, 2**16

SCALARS = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor's place in the file.

    Attributes:
        shape: the fastest axis first, as ggml lists it.
        kind: how its elements are stored.
        start: first byte, from the file's beginning.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int

    def dequantize(self, path: Path) -> np.ndarray:
        """Returns its elements as float32, the fastest axis last.

        Raises:
            NotImplementedError: the gguf package cannot dequantize its kind.
        """
        content = np.fromfile(path, np.uint8, self.size, offset=self.start)
        if content.size != self.size:
            raise DamagedError(
                "the file was cut short while it was read", file=path, entry=self.name
            )
        plain = {
            gguf.GGMLQuantizationType.F32: np.float32,
            gguf.GGMLQuantizationType.F16: np.float16,
        }
        content = content.view(plain.get(self.kind, np.uint8)).reshape(*self.shape[:0:-1], -1)
        with np.errstate(all="ignore"):  # a scale that is not finite shows in the result
            return np.asarray(gguf.dequantize(content, self.kind), np.float32).reshape(
                self.shape[::-1]
            )


class _Array(NamedTuple):
    kind: int
    length: int
    start: int


class Header:
    """A file's fields and tensors.

    Attributes:
        tensors: the tensors in the file's order.

    Raises:
        CheckpointError: it is no regular file.
        DamagedError: what it declares cannot be in a file of its size.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_regular(path) as file:
            self._size = file.seek(0, 2)
            if self._size < 24:
                self._damaged("it is too short for a header")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self._elements = 0, 0
        if self._take(4) != b"GGUF":
            self._damaged("it does not begin as a GGUF file")
        if (version := self._number("<I")) not in (2, 3):
            self._damaged("only versions 2 and 3, little-endian, can be read", found=version)
        tensors, fields = self._number("<Q"), self._number("<Q")
        # The smallest field takes 13 bytes, the smallest tensor's entry 33.
        for what, count, least, most in (
            ("tensors", tensors, 33, TENSORS),
            ("fields", fields, 13, FIELDS),
        ):
            if count > min(most, (self._size - self._at) // least):
                self._damaged(
                    f"it cannot hold so many {what}",
                    found=count,
                    wanted=f"at most {most}, and room for them",
                )
        self._fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string(NAME_BYTES)
            if name in self._fields:
                self._damaged("a field is given twice", entry=name)
            self._fields[name] = self._value(name)
        infos = [self._info() for _ in range(tensors)]
        self.tensors = list(self._places(infos))

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        """Returns a field's value, arrays as lists; None where it is not there."""
        value = self._fields.get(name)
        if not isinstance(value, _Array):
            return value
        self._at = value.start
        if value.kind == STRING:
            return [self._string(TEXT_BYTES) for _ in range(value.length)]
        if value.length > ELEMENTS:
            self._damaged(
                "the array is too long",
                entry=name,
                found=value.length,
                wanted=f"at most {ELEMENTS}",
            )
        return np.frombuffer(self._data, SCALARS[value.kind], value.length, value.start).tolist()

    def _value(self, name: str) -> Any:
        kind = self._number("<I")
        if kind == STRING:
            return self._string(TEXT_BYTES)
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            self._damaged("a field's type is unknown", entry=name, found=kind)
        item, count, start = self._number("<I"), self._number("<Q"), self._at
        if item in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[item]))
        elif item == STRING:
            self._elements += count
            if self._elements > ELEMENTS or count > (self._size - start) // 8:
                wanted = f"at most {ELEMENTS} in all, and room for them"
                self._damaged(
                    "it cannot hold so many strings", entry=name, found=count, wanted=wanted
                )
            self._at = self._after_strings(count)
        else:
            self._damaged(
                "only arrays of numbers and of strings can be read", entry=name, found=item
            )
        return _Array(item, count, start)

    def _after_strings(self, count: int) -> int:
        """Returns the offset after so many strings."""
        at, last, data = self._at, self._size - 8, self._data
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + length(data, at)[0]
        if at > self._size:
            self._damaged("it ends within an array of strings")
        return at

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(NAME_BYTES)
        if not 1 <= (dims := self._number("<I")) <= DIMS:
            self._damaged(
                "a tensor's number of dimensions cannot be",
                entry=name,
                found=dims,
                wanted=f"1 to {DIMS}",
            )
        shape = tuple(self._number("<Q") for _ in range(dims))
        return name, shape, self._number("<I"), self._number("<Q")

    def _places(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> Iterator[Tensor]:
        """Checks that the tensors lie in the file, one after the other."""
        alignment = self._fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if (
            type(alignment) is not int
            or not 0 < alignment <= ALIGNMENT
            or alignment & (alignment - 1)
        ):
            wanted = f"a power of two up to {ALIGNMENT}"
            self._damaged(
                "the alignment cannot be", entry="general.alignment", found=alignment, wanted=wanted
            )
        begin = -(-self._at // alignment) * alignment
        names, spans = set(), []
        for name, shape, raw, offset in infos:
            if name in names:
                self._damaged("a tensor is given twice", entry=name)
            names.add(name)
            try:
                kind = gguf.GGMLQuantizationType(raw)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                self._damaged("a tensor's type is unknown", entry=name, found=raw)
            elements = 1
            for length in shape:
                elements *= length
            if not elements or shape[0] % block:
                self._damaged(
                    f"a tensor of {kind.name} cannot have such a shape",
                    entry=name,
                    found=list(shape),
                )
            size, start = elements // block * block_bytes, begin + offset
            if start + size > self._size or offset % alignment:
                wanted = f"bytes {start} to {start + size}"
                self._damaged(
                    "a tensor does not lie in the file", entry=name, found=self._size, wanted=wanted
                )
            spans.append((start, start + size, name))
            yield Tensor(name, shape, kind, start, size)
        spans.sort()
        for (_, end, _), (start, _, name) in zip(spans, spans[1:], strict=False):
            if start < end:
                self._damaged("a tensor overlaps another", entry=name)

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count)
        return self._data[start : self._at]

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            self._damaged(f"it ends {count - (self._size - self._at)} bytes too early")
        self._at += count

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self, most: int) -> str:
        if (length := self._number("<Q")) > most:
            self._damaged("a string is too long", found=length, wanted=f"at most {most} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._damaged("a string is not UTF-8")

    def _damaged(self, problem: str, **fields: Any) -> NoReturn:
        raise DamagedError(f"no GGUF file, or a damaged one: {problem}", file=self._path, **fields)
