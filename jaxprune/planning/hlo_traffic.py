"""The bytes that a compiled program moves between memory and compute units, and between devices, by
its text.

XLA's own analysis counts a loop's body once, and is not there for GPUs. Here an instruction reads
its operands and writes its result; of an array that is sliced, or updated in part, only that part
counts. What lies in a TPU's vector memory (memory space 1) costs nothing.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async-update",
}
"""Instructions that move nothing themselves; the ends of asynchronous ones do not, either."""
COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
"""Instructions by which devices exchange data."""
PARTS = {"slice", "dynamic-slice", "gather"}
"""Instructions that read no more than they return."""
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
    r"\{?([^,}\s]+(?:, %[^,}\s]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"\}')


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: of its result.
        root: whether that is the computation's.
        opcode: what it does.
        size: bytes of the result.
        operands: names.
        called: the computations that it names.
        trips: how often a loop runs; 1 where that is not known.
    """

    name: str
    root: bool
    opcode: str
    size: float
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int


class Module:
    """A compiled program.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Attributes:
        computations: name -> its instructions.
        entry: the name of the one that is run.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", ""
        for line in text.splitlines():
            if match := _HEAD.match(line):
                current = match[2]
                self.computations[current] = []
                self.entry = current if match[1] else self.entry
            elif current and (found := _LINE.match(line)):
                self.computations[current].append(_parsed(bool(found[1]), found[2], found[3]))

    def instructions(self) -> int:
        """Returns the number of instructions, those of computations that are fused into one
        included."""
        return sum(map(len, self.computations.values()))

    def traffic(self, computation: str | None = None) -> float:
        """Returns the bytes that a call moves; of alternatives, the most."""
        own = self.computations[self.entry if computation is None else computation]
        sizes = {one.name: one.size for one in own}
        return sum(self._traffic_of(one, sizes) for one in own)

    def exchanged(self, computation: str | None = None) -> float:
        """Returns the bytes that each device sends to others in a call, in rings; of alternatives,
        the most."""
        own = self.computations[self.entry if computation is None else computation]
        sizes = {one.name: one.size for one in own}
        return sum(self._exchanged_by(one, sizes) for one in own)

    def _exchanged_by(self, one: Instruction, sizes: dict[str, float]) -> float:
        opcode = one.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            given = sum(sizes.get(name, 0.0) for name in one.operands)
            # a start returns both
            made = one.size - given * (one.opcode != opcode and opcode != "all-reduce")
            return {
                "all-reduce": 2 * given,
                "all-gather": made - given,
                "reduce-scatter": given - made,
            }.get(opcode, given)
        inside = [self.exchanged(name) for name in one.called if name in self.computations]
        return one.trips * (
            max(inside, default=0.0) if one.opcode == "conditional" else sum(inside)
        )

    def _traffic_of(self, one: Instruction, sizes: dict[str, float]) -> float:
        if one.opcode in FREE or one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "while":
            return one.trips * self.traffic(one.called[0])
        if one.opcode == "conditional":
            return max(self.traffic(name) for name in one.called)
        if one.opcode == "call":
            return self.traffic(one.called[0])
        if one.opcode == "fusion":
            return sum(self._fused(one.called[0]))
        if one.opcode in PARTS:
            return 2 * one.size
        if one.opcode == "dynamic-update-slice":
            return 2 * sizes.get(one.operands[1], 0.0)
        return one.size + sum(sizes.get(name, 0.0) for name in one.operands)

    def _fused(self, name: str) -> Iterator[float]:
        """Yields what a fused computation reads of each parameter, and what it writes."""
        own = {one.name: one for one in self.computations[name]}
        for one in own.values():
            if one.opcode == "parameter":
                users = [other for other in own.values() if one.name in other.operands]
                if users and all(
                    user.opcode in PARTS and user.operands[0] == one.name for user in users
                ):
                    yield sum(user.size for user in users)
                elif not all(_updates(user, one.name) for user in users):
                    yield one.size
            if one.root:
                results = (
                    [own.get(operand, one) for operand in one.operands]
                    if one.opcode == "tuple"
                    else [one]
                )
                for result in results:
                    while result.opcode == "bitcast" and result.operands[0] in own:
                        result = own[result.operands[0]]
                    update = result.operands[1] if result.opcode == "dynamic-update-slice" else ""
                    yield 2 * own[update].size if update in own else result.size


def _updates(user: Instruction, name: str) -> bool:
    """Returns whether an instruction overwrites a part of an array in its place."""
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _parsed(root: bool, name: str, rest: str) -> Instruction:
    """Returns an instruction of a line, after the name of its result."""
    end = _closing(rest) + 1 if rest.startswith("(") else len(re.match(r"\S*", rest)[0])  # type: ignore[index]
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    called = [
        one.strip().lstrip("%") for group in _CALLED.findall(rest[end:]) for one in group.split(",")
    ]
    trips = _TRIPS.search(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(
        name,
        root,
        opcode.strip(),
        _size(shape),
        operands,
        tuple(called),
        int(trips[1]) if trips else 1,
    )


def _closing(text: str) -> int:
    """Returns the place of the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _size(shape: str) -> float:
    """Returns the bytes of a shape, or of a tuple's arrays, that lie in the device's main
    memory."""
    return sum(
        _item_bytes(dtype) * math.prod(int(n) for n in axes.split(",") if n)
        for dtype, axes, layout in _ARRAY.findall(shape)
        if "S(1)" not in layout
    )


def _item_bytes(dtype: str) -> float:
    """Returns the bytes of a number: the name of a dtype holds its bits, as bf16 or f8e4m3fn."""
    bits = re.search("[0-9]+", dtype)
    return int(bits[0]) / 8 if bits else float(dtype == "pred")
