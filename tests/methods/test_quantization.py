"""Coordinate descent on the grids of GGUF files, held to the gguf package's rounding and to plain
NumPy."""

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxprune.methods.quantization import BITS, BLOCK, off_grid, quantize
from tests.helpers import oracles

KINDS = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q5_0": gguf.GGMLQuantizationType.Q5_0}
N, M = 5 * BLOCK, 24

every_kind = pytest.mark.parametrize("kind", BITS)


def problem(
    tokens: int = 500, n: int = N, seed: int = 0
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """Returns a Gram matrix, a kernel whose outputs are wanted, and a mask."""
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, tokens, n)
    weight, mask = generator.normal(size=(n, M)), generator.random((n, M)) < 0.5
    return (
        jnp.asarray(x.T @ x, jnp.float32),
        jnp.asarray(weight * mask, jnp.float32),
        jnp.asarray(mask),
    )


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """Returns what a GGUF file of a kernel holds."""
    rows = np.ascontiguousarray(np.asarray(weight, np.float32).T)
    return gguf.dequantize(gguf.quantize(rows, KINDS[kind]), KINDS[kind]).T


def loss(gram: jnp.ndarray, wanted: jnp.ndarray, weight: np.ndarray, damping: float = 0.0) -> float:
    g, difference = (
        np.asarray(gram, np.float64),
        np.asarray(wanted, np.float64) - np.asarray(weight, np.float64),
    )
    g = g + damping * np.diag(np.diag(g))
    return float(np.sum(difference * (g @ difference)))


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [BLOCK, N])
def test_a_file_holds_the_weights_exactly(kind: str, dtype: type, n: int) -> None:
    gram, weight, mask = problem(n=n)
    found = np.asarray(quantize(gram, weight, weight, mask, BITS[kind]))
    stored = found.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(stored, found)
    np.testing.assert_array_equal(rounded(stored, kind), found)
    assert off_grid(stored, BITS[kind]) == 0
    assert off_grid(np.asarray(weight), BITS[kind]) == np.count_nonzero(
        rounded(weight, kind) != np.asarray(weight)
    )
    assert (found[~np.asarray(mask)] == 0).all()
    assert np.count_nonzero(found) > 0.95 * np.count_nonzero(rounded(np.asarray(weight), kind))


@every_kind
def test_it_loses_much_less_than_rounding(kind: str) -> None:
    gram, weight, mask = problem()
    found = quantize(gram, weight, weight, mask, BITS[kind])
    assert loss(gram, weight, found) < 0.5 * loss(gram, weight, rounded(weight, kind))


def test_no_weight_has_a_better_neighbour_on_the_grid() -> None:
    gram, weight, mask = problem()
    found = np.asarray(quantize(gram, weight, weight, mask, 4, sweeps=100, damping=0.1))
    blocks = found.reshape(-1, BLOCK, M)
    at = np.abs(blocks).argmax(axis=1)
    scale = np.take_along_axis(blocks, at[:, None, :], axis=1) / -8
    integers = np.round(blocks / scale)
    g = np.asarray(gram, np.float64) * (1 + 0.1 * np.eye(N))
    gradient = (g @ (found.astype(np.float64) - np.asarray(weight))).reshape(blocks.shape)
    free = np.asarray(mask).reshape(blocks.shape) & (integers != -8)  # one of these holds the scale
    diagonal = np.diag(g).reshape(-1, BLOCK, 1)
    for step in (-1, 1):
        possible = free & (integers + step >= -8) & (integers + step <= 7)
        change = 2 * step * scale * gradient + (step * scale) ** 2 * diagonal
        assert possible.sum() > 0.8 * np.asarray(mask).sum() and (change[possible] > 0).all()


def test_it_makes_good_what_pruning_lost() -> None:
    """The outputs that are wanted may be other weights' than those it starts from."""
    gram, weight, mask = problem()
    dense = weight + jnp.where(mask, jnp.zeros_like(weight), jnp.ones_like(weight))
    towards_dense, alone = (quantize(gram, wanted, weight, mask, 4) for wanted in (dense, weight))
    assert loss(gram, dense, towards_dense) < 0.7 * loss(gram, dense, alone)


def test_outputs_do_not_interact() -> None:
    gram, weight, mask = problem()
    order = np.random.default_rng(1).permutation(M)
    found = quantize(gram, weight, weight, mask, 4)
    permuted = quantize(gram, weight[:, order], weight[:, order], mask[:, order], 4)
    np.testing.assert_array_equal(permuted, found[:, order])


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e3])
def test_dead_inputs_empty_blocks_and_odd_sizes_do_no_harm(size: float) -> None:
    gram, weight, mask = problem(tokens=20)
    alive = jnp.asarray(np.arange(N) % 5 != 0)
    mask = mask.at[:BLOCK, 0].set(False)
    weight = jnp.where(mask, weight * jnp.float32(size), jnp.zeros_like(weight))
    for g in (
        jnp.where(alive[:, None] & alive[None, :], gram, jnp.zeros_like(gram)),
        jnp.zeros_like(gram),
    ):
        found = np.asarray(quantize(g, weight, weight, mask, 4))
        assert np.isfinite(found).all() and (found[~np.asarray(mask)] == 0).all()
        assert np.abs(found).max() <= 2 * max(5 * size, 2**-15)
        np.testing.assert_array_equal(rounded(found, "q4_0"), found)


def test_it_is_one_loop_to_the_compiler() -> None:
    def size(n: int, m: int) -> int:
        shapes = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((n, n), "f4"), ((n, m), "f4"), ((n, m), "?"))
        )
        traced = jax.make_jaxpr(lambda g, w, k: quantize(g, w, w, k, 4))
        return str(traced(*shapes)).count(" = ")

    assert abs(size(8192, 32) - size(16384, 128)) < 20
