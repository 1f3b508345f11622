"""SparseGPT against a float64 NumPy transcription of the paper's algorithm."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.sparsity.patterns import parse_pattern
from tests.helpers import oracles

M = 20


def problem(n: int, tokens: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, tokens, n)
    return x.T @ x, generator.normal(size=(n, M))


@pytest.mark.parametrize("n", [48, 60])  # 60 is no multiple of the block
@pytest.mark.parametrize(
    ("pattern", "sparsity", "block", "group_block"),
    [
        ("unstructured", 0.6, 16, 16),
        ("unstructured", 0.35, 128, 128),
        ("per-output", 0.5, 16, 16),
        ("2:4", 0.5, 16, 16),
        ("1:3", 2 / 3, 16, 15),  # the nearest multiple of 3
        ("2:12", 5 / 6, 8, 12),  # a group larger than the block
    ],
)
def test_it_is_the_papers(
    n: int, pattern: str, sparsity: float, block: int, group_block: int
) -> None:
    gram, weight = problem(n)
    method = SparseGPT(block=block)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), parse_pattern(pattern, sparsity)
    )
    expected, mask = oracles.sparsegpt(gram, weight, pattern, sparsity, block=min(group_block, n))
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block", [16, 128])
def test_the_update_for_a_given_mask_is_the_papers(block: int) -> None:
    gram, weight = problem(60, seed=1)
    mask = np.random.default_rng(2).random(weight.shape) < 0.4
    method = SparseGPT(block=block, damping=0.05)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    expected, _ = oracles.sparsegpt(gram, weight, "", 0, block=block, damping=0.05, mask=mask)
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-8, atol=1e-10)


def test_the_block_is_a_matter_of_speed_under_a_given_mask() -> None:
    gram, weight = problem(60, seed=3)
    mask = jnp.asarray(np.random.default_rng(4).random(weight.shape) < 0.5)
    first, second = (
        method.solve(method.prepare(jnp.asarray(gram)), jnp.asarray(weight), mask).weight
        for method in (SparseGPT(block=7), SparseGPT(block=60))
    )
    np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-12)


def test_updating_under_its_own_mask_changes_nothing() -> None:
    # The mask of a block is selected as the block is entered, and what came before depends on its
    # own mask only.
    gram, weight = problem(48, seed=5)
    method = SparseGPT(block=16)
    prepared = method.prepare(jnp.asarray(gram))
    joint = method.solve(prepared, jnp.asarray(weight), parse_pattern("unstructured", 0.6))
    again = method.solve(prepared, jnp.asarray(weight), joint.mask)
    np.testing.assert_allclose(again.weight, joint.weight, rtol=1e-12, atol=1e-14)


def test_dead_inputs_are_pruned_first_and_change_nothing_else() -> None:
    gram, weight = problem(48, seed=6)
    gram[5] = gram[:, 5] = 0
    method = SparseGPT(block=16)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), parse_pattern("unstructured", 0.5)
    )
    expected, mask = oracles.sparsegpt(gram, weight, "unstructured", 0.5, block=16)
    np.testing.assert_array_equal(solution.mask, mask)
    assert not solution.mask[5].any()
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-8, atol=1e-10)


def test_float32_is_close_to_float64() -> None:
    gram, weight = problem(60, seed=7)
    method = SparseGPT(block=16)
    solution = method.solve(
        method.prepare(jnp.asarray(gram, jnp.float32)),
        jnp.asarray(weight, jnp.float32),
        parse_pattern("2:4"),
    )
    expected, mask = oracles.sparsegpt(gram, weight, "2:4", 0.5, block=16)
    assert solution.weight.dtype == jnp.float32
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=2e-3, atol=2e-3)
