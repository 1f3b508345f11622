r"""Quantization of pruned weights to the grid of llama.cpp's Q4_0 or Q5_0, by coordinate descent.

Q4_0 stores blocks of 32 consecutive inputs of an output as d·q: a scale d and integers q from −8 to
7. q = 0 is an exact zero. Q5_0's integers go from −16 to 15.

The descent minimises ‖XW₀ − XW‖²_F over weights that are zero outside the mask and on the grid
inside it. In contrast to rounding, later weights compensate the errors of earlier ones. With G =
XᵀX and the gradient R = G(W − W₀), each sweep visits the inputs in order, all outputs at once. w_j
becomes the grid value nearest to w_j − R_j/G_jj, the optimum while all other weights stay fixed.
Before a block is visited again, its scale moves to the minimum of the loss along the block's
weights.

The initial scale is the best of 21 values around the largest weight divided by the least integer:
the one with the smallest rounding loss, weighted by G_jj. The largest weight of a block always has
the least integer, d·(−8) or d·(−16). llama.cpp and the gguf package derive the scale from this
weight, so they recover the same d and q. Scales have few significant bits, and each d·q is exact in
bfloat16, float16 and float32. So a cast to a checkpoint's dtype moves no weight off the grid.

References:
    Behdin et al., "QuantEase: Optimization-based Quantization for Language Models" (arXiv
    2309.01885), Algorithm 1, here with fixed zeros and moving scales.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.methods import Gram, Kernel, Mask
from jaxprune.methods.linalg import Scalar, masked, matmul

BITS: Mapping[str, int] = MappingProxyType({"q4_0": 4, "q5_0": 5})
"""GGUF type -> bits of its integers."""
BLOCK = 32
"""Consecutive inputs of an output that share a scale."""
AT_ONCE = 4
"""Blocks between two updates of the gradient of all inputs; each update is one product."""
SIGNIFICANT = 8
"""Significant bits of bfloat16, the fewest of all dtypes that checkpoints are stored in."""
FACTORS = np.linspace(0.7, 1.2, 21)
"""Candidates for the initial scale, relative to the largest weight divided by the least integer."""


def has_grid(inputs: int) -> bool:
    """Returns whether the inputs of a kernel fill whole blocks; other kernels are stored in
    float16."""
    return inputs % BLOCK == 0


class _State(NamedTuple):
    """Weights during the descent.

    Attributes:
        weight: [n, m].
        gradient: G(W - W0), [n, m].
        scales: [n / 32, m], one per block and output.
    """

    weight: Kernel
    gradient: Kernel
    scales: Float[Array, "b m"]


def off_grid(weight: Float[np.ndarray, "n m"], bits: int) -> int:
    """Returns how many weights of a kernel a file with integers of `bits` bits would change."""
    blocks, least = (
        np.asarray(weight, np.float32).reshape(-1, BLOCK, weight.shape[1]),
        np.float32(-(2 ** (bits - 1))),
    )
    at = np.abs(blocks).argmax(axis=1)[:, None, :]
    scale = (np.take_along_axis(blocks, at, axis=1) / least).astype(np.float16).astype(np.float32)
    integers = np.round(blocks / np.where(scale == 0, 1, scale)).clip(least, -1 - least)
    return int(np.count_nonzero(integers * scale != blocks))


@partial(jax.jit, static_argnames=("bits", "sweeps"))
def quantize(
    gram: Gram,
    wanted: Kernel,
    start: Kernel,
    mask: Mask,
    bits: int,
    sweeps: int = 10,
    damping: Scalar = 0.3,
) -> Kernel:
    """Moves pruned weights to a grid; outputs are independent of each other.

    Args:
        gram: [n, n], XᵀX, float32.
        wanted: W₀, [n, m], the kernel whose outputs are approximated.
        start: [n, m], the pruned weights, zero where the mask is False; n is a multiple of 32.
        mask: [n, m], True = kept. A kept weight may become zero, which is on the grid.
        bits: the bits of the integers.
        sweeps: the number of visits to every input.
        damping: ridge of every input towards W₀, relative to its own diagonal element.

    Returns:
        Weights [n, m] on the grid.
    """
    n, size = len(start), BLOCK * AT_ONCE
    padding = -n % size
    ridge = jnp.asarray(damping, gram.dtype) * jnp.diagonal(gram)
    gram = gram + jnp.diag(ridge)
    gradient = matmul(gram, start - wanted)
    gram = jnp.pad(gram, (0, padding))
    weight, gradient, mask = (
        jnp.pad(array, ((0, padding), (0, 0))) for array in (start, gradient, mask)
    )
    scales, largest = _first_scales(jnp.diagonal(gram), weight, bits)

    def visit_blocks(sweep: int | Array, number: int | Array, state: _State) -> _State:
        """Visits `AT_ONCE` blocks, then updates the gradient of all inputs."""
        first = number * size
        rows = lax.dynamic_slice_in_dim(gram, first, size)
        square = lax.dynamic_slice_in_dim(rows, first, size, axis=1)

        def visit_block(i: int | Array, inner: _State) -> _State:
            columns = lax.dynamic_slice_in_dim(square, i * BLOCK, BLOCK, axis=1)
            own = lax.dynamic_slice_in_dim(columns, i * BLOCK, BLOCK)
            before, gradient = (
                lax.dynamic_slice_in_dim(array, i * BLOCK, BLOCK) for array in inner[:2]
            )
            block = first // BLOCK + i
            scale = inner.scales[block]
            moved = jnp.where(sweep > 0, _moved(scale, own, before, gradient, bits), scale)
            scaled = before * (moved / scale)[None, :]
            kept = lax.dynamic_slice_in_dim(mask, block * BLOCK, BLOCK)
            visit = partial(_visit_input, own, kept, largest[block], moved, bits)
            start = scaled, gradient + matmul(own, scaled - before)
            after, _ = lax.fori_loop(0, BLOCK, visit, start)
            return _State(
                lax.dynamic_update_slice_in_dim(inner.weight, after, i * BLOCK, axis=0),
                inner.gradient + matmul(columns, after - before),
                inner.scales.at[block].set(moved),
            )

        before, slope = (lax.dynamic_slice_in_dim(array, first, size) for array in state[:2])
        after, _, scales = lax.fori_loop(
            0, AT_ONCE, visit_block, _State(before, slope, state.scales)
        )
        return _State(
            lax.dynamic_update_slice_in_dim(state.weight, after, first, axis=0),
            state.gradient + matmul(rows.T, after - before),
            scales,
        )

    def visit_all(sweep: int | Array, state: _State) -> _State:
        return lax.fori_loop(0, (n + padding) // size, partial(visit_blocks, sweep), state)

    return lax.fori_loop(0, sweeps, visit_all, _State(weight, gradient, scales)).weight[:n]


def _visit_input(
    gram: Float[Array, "b b"],
    mask: Bool[Array, "b m"],
    largest: Int[Array, "m"],
    scale: Float[Array, "m"],
    bits: int,
    j: int | Array,
    state: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Moves an input's weights to the grid.

    Args:
        gram: [b, b], of the block's inputs.
        mask: [b, m], of the block.
        largest: [m], the input of the block with the largest weight of each output.
        scale: [m], the block's scale of each output.
        bits: the bits of the integers.
        j: the index of the input in the block.
        state: the block's weights and their gradient, each [b, m].
    """
    weight, gradient = state
    row = gram[j]
    best = weight[j] - gradient[j] / jnp.where(row[j] > 0, row[j], jnp.asarray(1, gram.dtype))
    value = masked(mask[j], _nearest(best, scale, largest == j, bits))
    return weight.at[j].set(value), gradient + row[:, None] * (value - weight[j])[None, :]


def _nearest(value: Array, scale: Array, held: Array, bits: int) -> Array:
    """Returns the grid values nearest to some values; a held weight always gets the least
    integer."""
    least = jnp.asarray(-(2 ** (bits - 1)), value.dtype)
    integer = jnp.clip(jnp.round(value / scale), least, -jnp.ones_like(least) - least)
    return jnp.where(held, least, integer) * scale


def _rounded(scale: Array, bits: int) -> Array:
    """Rounds scales to so few bits that their products with the integers are exact in bfloat16 and
    float16."""
    rounded = lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=SIGNIFICANT - bits)
    smallest = jnp.asarray(2.0 ** (bits - SIGNIFICANT - 16), scale.dtype)  # float16's step is 2^-24
    return jnp.where(
        jnp.abs(rounded) < smallest, jnp.where(rounded < 0, -smallest, smallest), rounded
    )


def _first_scales(diagonal: Float[Array, "n"], weight: Kernel, bits: int) -> tuple[Array, Array]:
    """Returns the scales of least rounding loss and the index of the largest weight of each block,
    both [b, m]."""
    blocks, importance = weight.reshape(-1, BLOCK, weight.shape[1]), diagonal.reshape(-1, BLOCK, 1)
    at = jnp.argmax(jnp.abs(blocks), axis=1).astype(jnp.int32)
    usual = jnp.take_along_axis(blocks, at[:, None, :], axis=1)[:, 0] / -(2 ** (bits - 1))
    held = (jnp.arange(BLOCK, dtype=jnp.int32)[None, :, None] == at[:, None, :]) & (blocks != 0)

    def consider(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scale = _rounded(usual * factor, bits)
        lost = jnp.sum(
            importance * (blocks - _nearest(blocks, scale[:, None, :], held, bits)) ** 2, axis=1
        )
        return (jnp.minimum(best[0], lost), jnp.where(lost < best[0], scale, best[1])), None

    start = jnp.full(usual.shape, jnp.inf, weight.dtype), _rounded(usual, bits)
    (_, scales), _ = lax.scan(consider, start, jnp.asarray(FACTORS, weight.dtype))
    return scales, at


def _moved(scale: Array, square: Array, weight: Array, gradient: Array, bits: int) -> Array:
    """Returns a block's scales that minimise the loss along its weights; unchanged if their
    rounding would increase the loss."""
    along, curvature = (
        jnp.sum(weight * gradient, axis=0),
        jnp.sum(weight * matmul(square, weight), axis=0),
    )
    one = jnp.ones_like(along)
    moved = _rounded(
        scale * jnp.clip(one - along / jnp.where(curvature > 0, curvature, one), 0.5, 2.0), bits
    )
    step = moved / scale - one
    return jnp.where(step * (2 * along + step * curvature) < 0, moved, scale)
