"""Sparsity patterns: scores -> mask, with exact counts.

A pattern is what the user asks for (`Unstructured(0.5)`, `NM(2, 4)`). For one kernel shape it gives a
`Selector`, which selects masks under jit: the numbers of zeros are arrays, so that linears of one shape and
different sparsities share one compilation.

Selecting the k-th smallest score needs no sort. The bits of a non-negative float order like an integer, so
the threshold is found bit by bit, from the highest, each by counting how many scores lie below a candidate.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import InputError

Scores = Float[Array, "n m"]
Mask = Bool[Array, "n m"]
Rule = Callable[[Scores, Int[Array, ""]], Mask]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selector:
    """Selects the mask of one kernel.

    Attributes:
        zeros: numbers of zeros, one a step of a gradual schedule, the last one final. Of the whole kernel,
            or of each output for `per_output` patterns.
        rule: (scores, zeros) -> mask.
    """

    zeros: Int[Array, "steps"]
    rule: Rule = dataclasses.field(metadata={"static": True})

    def __call__(self, scores: Scores, step: int | Int[Array, ""] = -1) -> Mask:
        """The mask (True = kept) that zeroes the smallest non-negative scores; of equal ones the last by index."""
        return self.rule(scores, self.zeros[step])

    def increments(self) -> "Selector":
        """The selector whose steps have the zeros that each step of this one adds to those before it."""
        return dataclasses.replace(self, zeros=jnp.diff(self.zeros, prepend=jnp.zeros_like(self.zeros[:1])))


@runtime_checkable
class Pattern(Protocol):
    """Which weights of a kernel may be kept."""

    @property
    def sparsity(self) -> float:
        """The final fraction of zeros."""
        ...

    @property
    def group(self) -> int | None:
        """So many consecutive inputs compete with each other only; None: all do."""
        ...

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        """A selector for kernels of this [n_in, n_out] shape.

        Args:
            shape: of the kernel.
            progress: fractions of the final sparsity, one a step; the last should be 1.

        Raises:
            InputError: the pattern is impossible for the shape.
        """
        ...

    def part_way(self, share: float) -> "Pattern":
        """A milder pattern of the same kind, which keeps about density^share of the weights; 0 < share ≤ 1."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Any weights; the smallest scores of the whole kernel, or of each output column, go.

    Attributes:
        sparsity: fraction of zeros, 0 ≤ sparsity < 1. The count is rounded to the nearest whole weight.
        per_output: compare scores within each output, as Wanda does, instead of over the whole kernel.
    """

    sparsity: float
    per_output: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {self.sparsity}")

    @property
    def group(self) -> None:
        return None

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        size = shape[0] if self.per_output else shape[0] * shape[1]
        rule = _keep_largest_per_output if self.per_output else _keep_largest
        return Selector(_counts(size, self.sparsity, progress), rule)

    def part_way(self, share: float) -> "Unstructured":
        return self if share == 1 else dataclasses.replace(self, sparsity=1 - (1 - self.sparsity) ** share)

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %" + (" per output" if self.per_output else "")


@dataclasses.dataclass(frozen=True)
class NM:
    """N of every M consecutive inputs of an output are kept (2:4 is n = 2, m = 4).

    While a gradual schedule is under way, the N largest of each group are protected and the smallest of all
    other weights go until the kernel's zeros are as many as the step wants.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(f"an N:M pattern keeps N of every M weights, 0 < N < M; {self.n}:{self.m} is not one")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def group(self) -> int:
        return self.m

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        if shape[0] % self.m:
            raise InputError(
                f"pattern {self} needs a number of inputs divisible by {self.m}, but a kernel has "
                f"{shape[0]}: choose an M that divides it, or an unstructured pattern"
            )
        final = shape[0] // self.m * (self.m - self.n) * shape[1]
        return Selector(_counts(final, 1.0, progress), _KeepInGroups(self.n, self.m))

    def part_way(self, share: float) -> "NM":
        return NM(min(self.m - 1, round(self.m * (self.n / self.m) ** share)), self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse(text: str, sparsity: float | None = None) -> Pattern:
    """The pattern a command line names: `unstructured`, `per-output` or `N:M`.

    Args:
        text: the name.
        sparsity: None: 0.5, or what N:M has.

    Raises:
        InputError: `text` is none of them, or the pattern is impossible.
    """
    if text in ("unstructured", "per-output"):
        return Unstructured(0.5 if sparsity is None else sparsity, per_output=text == "per-output")
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        pattern = NM(int(match[1]), int(match[2]))
        if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
            raise InputError(f"{text} has a sparsity of {pattern.sparsity:g}, not {sparsity:g}: leave --sparsity out")
        return pattern
    raise InputError(f"unknown pattern {text!r}: use unstructured, per-output, or N:M such as 2:4")


def _counts(size: int, fraction: float, progress: Sequence[float]) -> Int[Array, "steps"]:
    return jnp.asarray(np.array([round(fraction * p * size) for p in progress], np.int32))


def _keep_largest(scores: Scores, zeros: Int[Array, ""]) -> Mask:
    return _keep(scores, zeros, axis=(0, 1))


def _keep_largest_per_output(scores: Scores, zeros: Int[Array, ""]) -> Mask:
    return _keep(scores, zeros, axis=(0,))


@dataclasses.dataclass(frozen=True)
class _KeepInGroups:
    n: int
    m: int

    def __call__(self, scores: Scores, zeros: Int[Array, ""]) -> Mask:
        groups = _order(scores).reshape(-1, self.m, scores.shape[1])
        index = jnp.arange(self.m, dtype=jnp.int32)
        # rank[j] = how many k of the group come before j: larger, or as large and earlier.
        mine, other = groups[:, :, None, :], groups[:, None, :, :]
        earlier = (index[None, :] < index[:, None])[None, :, :, None]
        rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2, dtype=jnp.int32)
        protected = (rank < self.n).reshape(scores.shape)
        return _keep_largest(jnp.where(protected, jnp.full_like(scores, jnp.inf), scores), zeros)


def _order(scores: Scores) -> Int[Array, "n m"]:
    """Integers in the order of the scores; backends that flush subnormal floats to zero still tell them apart."""
    return lax.bitcast_convert_type(scores, jnp.int64 if scores.dtype == jnp.float64 else jnp.int32)


def _keep(scores: Scores, zeros: Int[Array, ""], axis: tuple[int, ...]) -> Mask:
    """All but the `zeros` smallest scores along the axes."""
    bits = _order(scores)
    zeros = zeros.astype(jnp.int32)

    def count(predicate: Bool[Array, "n m"]) -> Int[Array, "1 _"]:
        return jnp.sum(predicate, axis=axis, keepdims=True, dtype=jnp.int32)

    threshold = _largest(lambda t: count(bits < t) <= zeros, jnp.iinfo(bits.dtype).bits - 1, bits[:1, :1])
    keep = bits >= threshold
    short = zeros - count(~keep)

    def break_ties() -> Mask:
        index = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        if axis == (0, 1):
            index = index * scores.shape[1] + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        tied = bits == threshold
        first = _largest(lambda i: count(tied & (index >= i)) >= short, 31, index[:1, :1])
        return keep & ~(tied & (index >= first))

    # Ties at the threshold are rare; without them the threshold alone gives the exact count.
    return lax.cond(jnp.any(short > 0), break_ties, lambda: keep)


def _largest(holds: Callable[[Array], Array], bits: int, like: Array) -> Array:
    """The largest integer below 2^bits for which a predicate, true up to some integer and false after, holds."""

    def body(i: Array, best: Array) -> Array:
        candidate = best | (one << (bits - 1 - i).astype(best.dtype))
        return jnp.where(holds(candidate), candidate, best)

    one = jnp.ones_like(like)
    return lax.fori_loop(0, bits, body, jnp.zeros_like(holds(like), like.dtype))
