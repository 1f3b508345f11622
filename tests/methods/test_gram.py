import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods import gram as stats


@pytest.mark.parametrize("width", [12, 519])  # one block, and four of two sizes
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gram_is_float32_accurate(dtype: jnp.dtype, width: int) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50, width)), dtype)
    exact = np.asarray(x, np.float64).reshape(-1, width)
    gram = stats.gram(x)
    assert gram.dtype == jnp.float32
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram, exact.T @ exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [12, 519])
def test_what_is_below_the_diagonal_stands_above_it_too(width: int) -> None:
    total = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    expected = np.tril(total) + np.tril(total, -1).T
    np.testing.assert_array_equal(stats.symmetric(jnp.asarray(total)), expected)


def test_batches_add_up_to_the_gram_of_all() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 10, 300)))
    total = jnp.zeros((300, 300))
    for batch in (x[:4], x[4:]):
        total = stats.add_gram(total, batch)
    np.testing.assert_allclose(stats.symmetric(total), stats.gram(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gram_weights_tokens(dtype: jnp.dtype) -> None:
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=(3, 7, 5)), dtype)
    weights = generator.random((3, 7)).astype(np.float32)
    exact = np.asarray(x, np.float64).reshape(-1, 5)
    expected = exact.T @ (exact * weights.reshape(-1, 1))
    np.testing.assert_allclose(stats.gram(x, jnp.asarray(weights)), expected, rtol=1e-5, atol=1e-5)


def test_relative_error_is_that_of_the_outputs() -> None:
    generator = np.random.default_rng(2)
    x, w = generator.normal(size=(40, 6)), generator.normal(size=(6, 4))
    pruned = w * (generator.random(w.shape) < 0.5)
    expected = np.sum((x @ w - x @ pruned) ** 2) / np.sum((x @ w) ** 2)
    gram = jnp.asarray(x.T @ x)
    np.testing.assert_allclose(
        stats.relative_error(gram, jnp.asarray(w), jnp.asarray(pruned)), expected
    )
    assert stats.relative_error(gram, jnp.asarray(w), jnp.asarray(w)) == 0
    assert stats.relative_error(jnp.zeros_like(gram), jnp.asarray(w), jnp.asarray(pruned)) == 0


def test_a_shifted_target_is_the_damped_least_squares_one() -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(200, 6))
    x = dense + 0.3 * generator.normal(size=(200, 6))
    kernel, weights = generator.normal(size=(6, 4)), generator.uniform(0.5, 2, 200)
    h, scale = x.T @ (weights[:, None] * x), np.sqrt(np.diag(x.T @ (weights[:, None] * x)))
    for share in (0.0, 0.25, 1.0):
        wanted = x @ kernel + share * (dense - x) @ kernel
        # Least squares for the wanted outputs, and towards the kernel in coordinates of unit
        # diagonal.
        ridge = 0.03 * np.diag(scale**2)
        expected = np.linalg.solve(h + ridge, x.T @ (weights[:, None] * wanted) + ridge @ kernel)
        moved = stats.add_shift(
            jnp.zeros((6, 6)), jnp.asarray(x), jnp.asarray(dense), jnp.asarray(weights)
        )
        found = stats.shifted_target(jnp.asarray(h), moved, jnp.asarray(kernel), share)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
