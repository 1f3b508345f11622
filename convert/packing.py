"""Arrays that are mostly zeros, in fewer bytes: where the others are, and their values.

Elements along the last axis are grouped where that takes fewer bits than a mask: of each m at most
n are not 0, and the places of n, those of zeros among them where there are fewer, are one of C(m,
n) combinations, in so many whole bits as number all of them. Combinations are numbered from 0 by
their masks, read as numbers with the first element in the lowest bit, in rising order. A negative
zero is no zero here: what comes back is what went in, bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Shaped, UInt, UInt8
from pydantic import Field

from convert.schema import OWN, Count

SIZES = (2, 4, 8, 16)
"""Elements of a group, where there are groups."""
BLOCK = 2**18
"""Elements that are looked at together: they stay in a processor's cache."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """A bit for each element, eight a byte, the first in the lowest bit; each row begins a byte.

    Attributes:
        kept: how many bits are set.
    """

    __pydantic_config__ = OWN

    kind: Literal["mask"] = dataclasses.field(default="mask", kw_only=True)
    kept: Count

    def count(self, shape: tuple[int, int]) -> int:
        """Returns how many elements are kept."""
        return self.kept

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Returns the bytes that say which are kept."""
        return shape[0] * -(-shape[1] // 8)

    def pack(
        self, nonzero: Bool[np.ndarray, "r n"]
    ) -> tuple[UInt8[np.ndarray, "_"], Bool[np.ndarray, "r n"]]:
        """Returns the bytes of some rows, and which elements of theirs are kept."""
        return np.packbits(nonzero, axis=1, bitorder="little").reshape(-1), nonzero

    def unpack(
        self, packed: UInt8[np.ndarray, "_"], shape: tuple[int, int]
    ) -> Bool[np.ndarray, "r n"]:
        """Returns which elements of some rows are kept."""
        return np.unpackbits(
            packed.reshape(shape[0], -1), axis=1, count=shape[1], bitorder="little"
        ).view(bool)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The number of a combination for each group, in `bits` bits, the lowest first, without gaps
    between the groups.

    Attributes:
        n: kept of each group.
        m: elements of a group.
    """

    __pydantic_config__ = OWN

    kind: Literal["groups"] = dataclasses.field(default="groups", kw_only=True)
    n: Annotated[int, Field(ge=1, lt=16)]
    m: Annotated[int, Field(ge=2, le=16)]

    def fits(self, shape: tuple[int, int]) -> bool:
        """Returns whether rows of this shape can be grouped so."""
        return self.m in SIZES and 0 < self.n < self.m and shape[1] % self.m == 0

    @property
    def bits(self) -> int:
        """Bits of a group."""
        return (math.comb(self.m, self.n) - 1).bit_length()

    def count(self, shape: tuple[int, int]) -> int:
        """Returns how many elements are kept."""
        return math.prod(shape) // self.m * self.n

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Returns the bytes that say which are kept."""
        return -(-math.prod(shape) // self.m * self.bits // 8)

    def pack(
        self, nonzero: Bool[np.ndarray, "r n"]
    ) -> tuple[UInt8[np.ndarray, "_"], Bool[np.ndarray, "r n"]]:
        """Returns the bytes of some rows, and which elements of theirs are kept."""
        numbers = _numbers(self.n, self.m)[_groups(nonzero, self.m)]
        as_bytes = numbers.astype("<u2").view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(as_bytes, axis=1, count=self.bits, bitorder="little")
        kept = np.take(_masks(self.n, self.m), numbers, axis=0)  # many times as fast as indexing
        return np.packbits(bits.reshape(-1), bitorder="little"), kept.reshape(nonzero.shape)

    def unpack(
        self, packed: UInt8[np.ndarray, "_"], shape: tuple[int, int]
    ) -> Bool[np.ndarray, "r n"]:
        """Returns which elements of some rows are kept; ValueError where the bytes cannot be."""
        groups, masks = math.prod(shape) // self.m, _masks(self.n, self.m)
        bits = np.unpackbits(packed, count=groups * self.bits, bitorder="little").reshape(
            groups, self.bits
        )
        numbers = np.zeros(groups, np.uint16)
        for place in range(self.bits):
            numbers |= bits[:, place].astype(np.uint16) << place
        if groups and numbers.max() >= len(masks):
            raise ValueError(f"a group has combination {numbers.max()} of {len(masks)}")
        return np.take(masks, numbers, axis=0).reshape(shape)


Places = Mask | Groups


def places_of(array: Shaped[np.ndarray, "r n"]) -> Places | None:
    """Returns how an array takes the fewest bytes; None: as it is."""
    bits = _bits(array)
    sizes = [m for m in SIZES if array.shape[1] % m == 0]
    kept, most = 0, dict.fromkeys(sizes, 0)
    for rows in _blocks(array.shape):
        nonzero = bits[rows] != 0
        kept += int(np.count_nonzero(nonzero))
        for m in sizes:
            most[m] = max(most[m], int(np.bitwise_count(_groups(nonzero, m)).max(initial=0)))
    ways: list[Places] = [Mask(kept), *(Groups(n, m) for m, n in most.items() if 0 < n < m)]

    def nbytes(places: Places) -> int:
        return places.nbytes(array.shape) + places.count(array.shape) * array.itemsize

    best = min(ways, key=nbytes)
    return best if nbytes(best) < array.nbytes else None


def pack(
    array: Shaped[np.ndarray, "r n"], places: Places
) -> tuple[UInt8[np.ndarray, "_"], Shaped[np.ndarray, "_"]]:
    """Returns the bytes of the places, and the values there in the order of the array."""
    bits, packed, values = _bits(array), [], []
    for rows in _blocks(array.shape):
        where, kept = places.pack(bits[rows] != 0)
        packed.append(where)
        # four times as fast as by a mask
        values.append(bits[rows].reshape(-1)[np.flatnonzero(kept)])
    return np.concatenate(packed), np.concatenate(values).view(array.dtype)


def unpack(
    packed: UInt8[np.ndarray, "_"],
    values: Shaped[np.ndarray, "_"],
    places: Places,
    shape: tuple[int, int],
) -> Shaped[np.ndarray, "r n"]:
    """Returns the array.

    Args:
        packed: the bytes of the places.
        values: those that are kept.
        places: how the bytes say where.
        shape: of the array.

    Raises:
        ValueError: the bytes do not say where so many values are.
    """
    bits, kept = np.zeros(shape, f"u{values.itemsize}"), values.view(f"u{values.itemsize}")
    start = used = 0
    for rows in _blocks(shape):
        part = bits[rows]
        end = start + places.nbytes(part.shape)
        where = np.flatnonzero(places.unpack(packed[start:end], part.shape))
        if used + len(where) > len(kept):
            raise ValueError(f"more than {len(kept)} places are kept")
        part.reshape(-1)[where] = kept[used : used + len(where)]
        start, used = end, used + len(where)
    if used < len(kept):
        raise ValueError(f"{used} places are kept, of {len(kept)} values")
    return bits.view(values.dtype)


def _bits(array: Shaped[np.ndarray, "r n"]) -> UInt[np.ndarray, "r n"]:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields rows by multiples of eight, so that a block's bits are whole bytes."""
    step = max(8, BLOCK // max(1, shape[1]) // 8 * 8)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _groups(nonzero: Bool[np.ndarray, "r n"], m: int) -> UInt[np.ndarray, "_"]:
    """Returns the masks of groups, as numbers."""
    packed = np.packbits(nonzero.reshape(-1), bitorder="little")
    if m >= 8:
        return packed.view(f"<u{m // 8}")
    parts = [packed >> place & (2**m - 1) for place in range(0, 8, m)]
    return np.stack(parts, axis=1).reshape(-1)[: nonzero.size // m]


@functools.cache
def _masks(n: int, m: int) -> Bool[np.ndarray, "k m"]:
    """Returns the masks with n of m, by the numbers of their combinations."""
    every = np.arange(2**m, dtype="<u2")
    return np.unpackbits(
        every[np.bitwise_count(every) == n].view(np.uint8).reshape(-1, 2),
        axis=1,
        count=m,
        bitorder="little",
    ).view(bool)


@functools.cache
def _numbers(n: int, m: int) -> UInt[np.ndarray, "_"]:
    """Returns the number of a group's combination by the group's mask; those with fewer than n take
    the first zeros."""
    every = np.arange(2**m, dtype=np.int64)
    full = every.copy()
    for _ in range(n):
        # sets the lowest bit that is not set
        full = np.where(np.bitwise_count(full) < n, full | (full + 1), full)
    numbers = np.zeros(2**m, np.uint16)
    numbers[np.bitwise_count(every) == n] = np.arange(math.comb(m, n))
    return np.where(np.bitwise_count(full) == n, numbers[full], 0).astype(np.uint16)
