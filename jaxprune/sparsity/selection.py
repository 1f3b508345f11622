"""Selection of the weights that are kept, with exact counts, under jit.

The numbers of zeros are arrays, so kernels of one shape and different sparsities share one
compilation. Selecting the k-th smallest score needs no full sort. The bits of a non-negative float
order like an integer, and a search over them finds the threshold in four or five passes: each one
counts the scores below several candidates.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Scores = Float[Array, "n m"]
Mask = Bool[Array, "n m"]
Rule = Callable[[Scores, Int[Array, "*projections"]], Mask]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selector:
    """Selects the mask of one kernel.

    Attributes:
        zeros: [steps, *projections], the number of zeros at each step of a gradual schedule. It
            counts the whole kernel, each output (`per_output` patterns), or each fused projection.
        rule: (scores, zeros) -> mask.
    """

    zeros: Any  # JAX also builds such trees with leaves that are not arrays
    rule: Rule = dataclasses.field(metadata={"static": True})

    def __call__(self, scores: Scores, step: int | Int[Array, ""] = -1) -> Mask:
        """Returns the mask (True = kept) that removes the smallest non-negative scores; among equal
        ones, the last by index."""
        return self.rule(scores, self.zeros[step])

    def increments(self) -> "Selector":
        """Returns the selector whose steps have only the zeros that each step adds to the previous
        one."""
        return dataclasses.replace(
            self, zeros=jnp.diff(self.zeros, axis=0, prepend=jnp.zeros_like(self.zeros[:1]))
        )


def counts(size: int, fraction: float, progress: Sequence[float]) -> Int[Array, "steps"]:
    """Returns the number of zeros at each step of a schedule: round(fraction · progress · size)."""
    return jnp.asarray(np.array([round(fraction * p * size) for p in progress], np.int32))


def keep_largest(scores: Scores, zeros: Int[Array, ""]) -> Mask:
    """Keeps all but the `zeros` smallest scores of the kernel."""
    return _keep(scores, zeros, axis=(0, 1))


def keep_largest_per_output(scores: Scores, zeros: Int[Array, ""]) -> Mask:
    """Keeps all but the `zeros` smallest scores of each output."""
    return _keep(scores.T, zeros, axis=(1,)).T  # a row's scores lie together


@dataclasses.dataclass(frozen=True)
class KeepInProjections:
    """Keeps all but the smallest scores of each fused projection; see `patterns.InProjections`.

    Attributes:
        widths: the number of outputs of each projection, in order; they repeat until the outputs
            end.
    """

    widths: tuple[int, ...]

    def __call__(self, scores: Scores, zeros: Int[Array, "projections"]) -> Mask:
        rows = scores.reshape(len(scores), -1, sum(self.widths))
        projections = jnp.split(rows, list(itertools.accumulate(self.widths[:-1])), axis=2)
        masks = [
            keep_largest(projection.reshape(len(scores), -1), count).reshape(projection.shape)
            for projection, count in zip(projections, zeros, strict=True)
        ]
        return jnp.concatenate(masks, axis=2).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class KeepInGroups:
    """Keeps the n largest of every m consecutive scores of an output; see `patterns.NM`."""

    n: int
    m: int

    def __call__(self, scores: Scores, zeros: Int[Array, ""]) -> Mask:
        groups = _order(scores).reshape(-1, self.m, scores.shape[1])
        index = jnp.arange(self.m, dtype=jnp.int32)
        # rank[j]: the number of scores in the group that are larger, or equal and earlier.
        mine, other = groups[:, :, None, :], groups[:, None, :, :]
        earlier = (index[None, :] < index[:, None])[None, :, :, None]
        rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2, dtype=jnp.int32)
        protected = (rank < self.n).reshape(scores.shape)
        return keep_largest(jnp.where(protected, jnp.full_like(scores, jnp.inf), scores), zeros)


def _order(scores: Scores) -> Int[Array, "n m"]:
    """Returns integers in the order of the scores; they differ even on backends that flush
    subnormal floats."""
    return lax.bitcast_convert_type(scores, jnp.int64 if scores.dtype == jnp.float64 else jnp.int32)


def _keep(scores: Scores, zeros: Int[Array, ""], axis: tuple[int, ...]) -> Mask:
    """Returns all but the `zeros` smallest scores along the axes."""
    bits, zeros = _order(scores), zeros.astype(jnp.int32)
    threshold, below = _threshold(bits, zeros, axis)
    keep, short = bits >= threshold, zeros - below

    def break_ties() -> Mask:
        index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        if axis == (0, 1):
            index += scores.shape[1] * lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        last_first = jnp.where(bits == threshold, scores.size - index, scores.size + 1)
        return keep & (last_first >= _threshold(last_first, short, axis)[0])

    # Ties at the threshold are rare; without them the threshold alone gives the exact count.
    return lax.cond(jnp.any(short > 0), break_ties, lambda: keep)


class _Bracket(NamedTuple):
    """A threshold lies in low ≤ threshold < high. Shapes [1, 1], or [n, 1] for one threshold per
    row.

    Attributes:
        low, high: keys.
        below_low, below_high: how many keys are smaller than each: at most the wanted number for
            `low`, more for `high`.
    """

    low: Array
    high: Array
    below_low: Array
    below_high: Array


def _threshold(
    keys: Int[Array, "n m"], zeros: Int[Array, "*_"], axis: tuple[int, ...]
) -> tuple[Int[Array, "_ 1"], Int[Array, "_ 1"]]:
    """Returns a threshold below which `zeros` non-negative keys lie, and how many do: fewer only if
    keys are equal.

    Interpolation search on the counts: a pass over the keys counts below seven candidates at once.
    The first candidates are quantiles of a sample. Later ones surround the place where the count
    would be right if keys were evenly spread between the nearest candidates, at multiples of the
    standard deviation of that guess. One candidate is always the middle, so each pass at least
    halves the remaining range.
    """
    size = keys.size if axis == (0, 1) else keys.shape[1]
    floating = jnp.float64 if keys.dtype == jnp.int64 else jnp.float32
    far = jnp.asarray(_FAR, floating)[None]
    low = jnp.zeros_like(keys[:1, :1] if axis == (0, 1) else keys[:, :1])
    high = jnp.full_like(low, jnp.iinfo(keys.dtype).max)
    none = jnp.zeros(low.shape, jnp.int32)
    bracket = _Bracket(low, high, none, jnp.full_like(none, size + 1))

    def narrow(bracket: _Bracket, candidates: Int[Array, "_ c"]) -> _Bracket:
        candidates = jnp.clip(candidates, bracket.low + 1, bracket.high - 1)
        below = _counts_below(keys, candidates, axis)
        fits = below <= zeros
        return _Bracket(
            low=jnp.max(jnp.where(fits, candidates, bracket.low), 1, keepdims=True),
            high=jnp.min(jnp.where(fits, bracket.high, candidates), 1, keepdims=True),
            below_low=jnp.max(jnp.where(fits, below, bracket.below_low), 1, keepdims=True),
            below_high=jnp.min(jnp.where(fits, bracket.below_high, below), 1, keepdims=True),
        )

    def spread(fraction: Array, count: Array) -> Array:
        """Returns the standard deviation of how many of `count` keys lie below a quantile."""
        return jnp.sqrt(fraction * (1 - fraction) * count)

    def unfinished(state: tuple[_Bracket, Array]) -> Bool[Array, ""]:
        bracket, _ = state
        return jnp.any((bracket.high - bracket.low > 1) & (bracket.below_low != zeros))

    def search(state: tuple[_Bracket, Array]) -> tuple[_Bracket, Array]:
        bracket = narrow(*state)
        low, high, below_low, below_high = bracket
        width, inside = (high - low).astype(floating), (below_high - below_low).astype(floating)
        fraction = ((zeros - below_low).astype(floating) + 0.5) / inside
        unit = jnp.maximum(width * spread(fraction, inside) / inside, 1)
        guesses = low + jnp.clip(fraction * width + far * unit, 0, width).astype(keys.dtype)
        return bracket, jnp.concatenate([low + (high - low) // 2, guesses], axis=1)

    sample = _sorted_sample(keys, size, axis)
    count = sample.shape[1]
    fraction = jnp.max(zeros).astype(floating) / size
    ranks = fraction * count + jnp.append(far[0], 0) * spread(
        fraction, jnp.asarray(count, floating)
    )
    quantiles = sample[:, jnp.clip(ranks.astype(jnp.int32), 0, count - 1)]
    (low, _, below_low, _), _ = lax.while_loop(unfinished, search, (bracket, quantiles))
    return low, below_low


_FAR = (-6.0, -1.5, -0.3, 0.3, 1.5, 6.0)
"""Where candidates lie around a guess, in its standard deviations."""


def _sorted_sample(keys: Int[Array, "n m"], size: int, axis: tuple[int, ...]) -> Int[Array, "_ s"]:
    """Returns about 4·√size keys. The odd stride visits all columns."""
    stride = (math.isqrt(size) // 4) | 1
    if axis != (0, 1):
        return jnp.sort(keys[:, ::stride], axis=1)
    rows, columns = jnp.divmod(jnp.arange(0, size, stride, dtype=jnp.int32), keys.shape[1])
    return jnp.sort(keys.at[rows, columns].get(mode="promise_in_bounds")[None], axis=1)


def _counts_below(
    keys: Int[Array, "n m"], candidates: Int[Array, "_ c"], axis: tuple[int, ...]
) -> Int[Array, "_ c"]:
    """Returns how many keys lie below each candidate, in one pass: XLA fuses a reduction of several
    arrays into one loop."""
    below = tuple(
        (keys < candidate).astype(jnp.int32)
        for candidate in jnp.split(candidates, candidates.shape[1], 1)
    )
    zeros = tuple(jnp.zeros((), jnp.int32) for _ in below)
    counts = lax.reduce(below, zeros, lambda a, b: tuple(map(lax.add, a, b)), axis)
    return jnp.stack(counts, axis=-1).reshape(candidates.shape)
