"""Sparsity patterns: which weights of a kernel may be kept, and how many are zero.

The user asks for a pattern, such as `Unstructured(0.5)` or `NM(2, 4)`. For the shape of a kernel it
creates a `Selector`, which selects masks under jit.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from pydantic import Discriminator, Tag

from convert.schema import OWN
from jaxprune.errors import Change, InputError
from jaxprune.sparsity.selection import (
    KeepInGroups,
    KeepInProjections,
    Selector,
    counts,
    keep_largest,
    keep_largest_per_output,
)

Projections = tuple[tuple[str, int], ...]
"""The fused projections of a linear layer: (name, number of outputs) of each, in order. They repeat
until the outputs end."""


def percent(fraction: float) -> str:
    """Formats a fraction in percent with all its digits, so different fractions get different
    texts."""
    return f"{(Decimal(repr(float(fraction))) * 100).normalize():f}"


@runtime_checkable
class Pattern(Protocol):
    """Which weights of a kernel may be kept."""

    @property
    def sparsity(self) -> float:
        """The final fraction of zeros."""
        ...

    @property
    def group(self) -> int | None:
        """The number of consecutive inputs that compete only with each other; None: all inputs
        compete."""
        ...

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        """Returns a selector for kernels of a shape.

        Args:
            shape: [n_in, n_out].
            progress: the fraction of the final sparsity at each step; the last should be 1.

        Raises:
            InputError: the pattern is impossible for the shape.
        """
        ...

    def zeros(self, shape: tuple[int, ...]) -> int:
        """Returns the number of zeros of a kernel of shape [n_in, n_out]; raises as `selector`
        does."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Removes the smallest scores of the whole kernel, or of each output.

    Attributes:
        sparsity: fraction of zeros, 0 ≤ sparsity < 1. The count is rounded to the nearest integer.
        per_output: compares scores within each output, as Wanda does, instead of over the whole
            kernel.
    """

    sparsity: float
    per_output: bool = False
    __pydantic_config__ = OWN

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {self.sparsity}")

    @property
    def group(self) -> None:
        return None

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        size = shape[0] if self.per_output else shape[0] * shape[1]
        rule = keep_largest_per_output if self.per_output else keep_largest
        return Selector(counts(size, self.sparsity, progress), rule)

    def zeros(self, shape: tuple[int, ...]) -> int:
        if self.per_output:
            return round(self.sparsity * shape[0]) * shape[1]
        return round(self.sparsity * (shape[0] * shape[1]))

    def __str__(self) -> str:
        share = f"{percent(self.sparsity)} %"
        return f"{share} per output" if self.per_output else share


NO_ZEROS = Unstructured(0.0)
"""Keeps every weight."""


@dataclasses.dataclass(frozen=True)
class _Within:
    """A pattern that selects the zeros of another pattern differently; nothing else changes."""

    pattern: Pattern

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    @property
    def group(self) -> int | None:
        return self.pattern.group

    def zeros(self, shape: tuple[int, ...]) -> int:
        return self.pattern.zeros(shape)

    def __str__(self) -> str:
        return str(self.pattern)


@dataclasses.dataclass(frozen=True)
class InProjections(_Within):
    """An unstructured pattern for each fused projection of a linear layer.

    Each projection gets its part of the kernel's zeros: within one weight, the number that it would
    have as a separate linear layer.
    """

    pattern: Unstructured
    widths: tuple[int, ...]

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        ends = [
            round(self.zeros(shape) * part / sum(self.widths))
            for part in itertools.accumulate(self.widths)
        ]
        # differences of rounded sums: separately rounded counts need not add up to the total
        final = np.diff(ends, prepend=0)
        # Each step is proportional to the final counts, so no step asks for more zeros than the
        # inputs of its group have weights.
        steps = np.array([np.round(p * final) for p in progress], np.int32)
        return Selector(jnp.asarray(steps), KeepInProjections(self.widths))


@dataclasses.dataclass(frozen=True)
class Partly(_Within):
    """A pattern that makes only a fraction of its zeros, before gradual pruning makes the others.

    `zeros` and `sparsity` are the final ones.

    Attributes:
        pattern: the pattern.
        share: the fraction of its zeros.
    """

    share: float

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        return self.pattern.selector(shape, [self.share * p for p in progress])


def partly(pattern: Pattern, gradual: float) -> Pattern:
    """Returns a pattern that leaves the sparsity `late` to gradual pruning."""
    return Partly(pattern, 1 - gradual / pattern.sparsity) if gradual else pattern


def in_projections(pattern: Pattern, projections: Projections) -> Pattern:
    """Returns the pattern of a linear layer with fused projections; only unstructured patterns
    change."""
    if isinstance(pattern, Partly):
        return Partly(in_projections(pattern.pattern, projections), pattern.share)
    if projections and isinstance(pattern, Unstructured) and not pattern.per_output:
        return InProjections(pattern, tuple(width for _, width in projections))
    return pattern


def by_projection(columns: Int[np.ndarray, "m"], projections: Projections) -> dict[str, int]:
    """Sums per-output numbers over the outputs of each fused projection."""
    widths = [width for _, width in projections]
    ends = list(itertools.accumulate(widths[:-1]))
    rows = np.split(columns.reshape(-1, sum(widths)), ends, axis=1) if projections else []
    return {name: int(row.sum()) for (name, _), row in zip(projections, rows, strict=True)}


@dataclasses.dataclass(frozen=True)
class NM:
    """Keeps N of every M consecutive inputs of an output (2:4 is n = 2, m = 4).

    During a gradual schedule, the N largest of each group are protected. The smallest of all other
    weights are removed until the kernel has the zeros of the step.
    """

    n: int
    m: int
    __pydantic_config__ = OWN

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 2**31:
            raise InputError(
                f"an N:M pattern keeps N of every M weights, 0 < N < M, not {self.n}:{self.m}"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def group(self) -> int:
        return self.m

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        return Selector(counts(self.zeros(shape), 1.0, progress), KeepInGroups(self.n, self.m))

    def zeros(self, shape: tuple[int, ...]) -> int:
        if shape[0] % self.m:
            raise InputError(
                f"pattern {self} needs a number of inputs divisible by {self.m}, but a kernel has "
                f"{shape[0]}: choose an M that divides it, or an unstructured pattern"
            )
        return shape[0] // self.m * (self.m - self.n) * shape[1]

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class Given:
    """Existing masks decide which weights are kept.

    Attributes:
        mask: the name of the masks, `from-checkpoint:DIR` or `from-file:FILE`; see `masks.load`.
    """

    mask: str
    __pydantic_config__ = OWN

    def __str__(self) -> str:
        return f"the mask {self.mask}"


def _kind(value: Any) -> str:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", ())
    return next((kind for name, kind in _KINDS.items() if name in fields), "is-unstructured")


_KINDS = {"mask": "is-given", "n": "is-nm"}
OwnPattern = Annotated[
    Annotated[Unstructured, Tag("is-unstructured")] | Annotated[NM, Tag("is-nm")],
    Discriminator(_kind),
]
"""A pattern that a rule may give."""
RecipePattern = Annotated[
    Annotated[Unstructured, Tag("is-unstructured")]
    | Annotated[NM, Tag("is-nm")]
    | Annotated[Given, Tag("is-given")],
    Discriminator(_kind),
]
"""A pattern that a recipe may have."""


def cubic(steps: int) -> list[float]:
    """Returns the fractions of the final sparsity at each step of a cubic schedule: 1 − (1 −
    (i+1)/steps)³."""
    return [1 - (1 - (i + 1) / steps) ** 3 for i in range(steps)]


def parse_pattern(text: str, sparsity: float | None = None) -> OwnPattern:
    """Returns the pattern of a name: `unstructured`, `per-output` or `N:M`.

    Args:
        text: the name.
        sparsity: fraction of zeros; None: 0.5, or the sparsity of N:M.

    Raises:
        InputError: `text` is none of these, or the pattern is impossible.
    """
    if text in ("unstructured", "per-output"):
        return Unstructured(0.5 if sparsity is None else sparsity, per_output=text == "per-output")
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text):
        pattern = NM(int(match[1]), int(match[2]))
        if sparsity is not None and not abs(sparsity - pattern.sparsity) <= 1e-6:
            raise InputError(
                f"{text} has a sparsity of {pattern.sparsity:g}, not {sparsity}",
                options={"sparsity": Change.OMIT},
            )
        return pattern
    raise InputError(f"unknown pattern {text!r}: use unstructured, per-output, or N:M such as 2:4")
