"""Products and inverses against NumPy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.linalg import inverse
from tests.helpers import oracles


def positive(n: int, ridge: float) -> np.ndarray:
    x = oracles.correlated(np.random.default_rng(n), 3 * n, n)
    gram = x.T @ x
    scale = np.sqrt(np.diag(gram))
    return gram / np.outer(scale, scale) + ridge * np.eye(n)


@pytest.mark.parametrize(("n", "leaf"), [(1, None), (7, 1), (50, 4), (129, None), (300, None)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_inverse(n: int, leaf: int | None, dtype: type) -> None:
    matrix = positive(n, 1.0)
    found = np.asarray(inverse(jnp.asarray(matrix, dtype), leaf))
    assert found.dtype == dtype
    np.testing.assert_allclose(matrix @ found, np.eye(n), atol=1e-11 if dtype == np.float64 else 2e-5)


@pytest.mark.parametrize("rank", [1, 10])
def test_float32_inverses_are_as_accurate_as_a_factorizations(rank: int) -> None:
    """Inputs of few directions and some noise, like an attention output's: inverting quarters loses all digits here."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(900, rank)) @ generator.normal(size=(rank, 300)) + 0.01 * generator.normal(
        size=(900, 300)
    )
    gram = x.T @ x
    scale = np.sqrt(np.diag(gram))
    matrix = gram / np.outer(scale, scale) + 1.1 * np.eye(300)

    def residual(found: np.ndarray) -> float:
        return float(np.linalg.norm(matrix @ found.astype(np.float64) - np.eye(300)))

    factor = np.linalg.inv(np.linalg.cholesky(matrix.astype(np.float32)))
    for leaf in (40, 300):
        assert residual(np.asarray(inverse(jnp.asarray(matrix, jnp.float32), leaf))) < 2 * residual(factor.T @ factor)


def test_inverse_of_an_ill_conditioned_matrix() -> None:
    matrix = positive(200, 1e-7)
    assert np.linalg.cond(matrix) > 1e5
    np.testing.assert_allclose(matrix @ np.asarray(inverse(jnp.asarray(matrix))), np.eye(200), atol=1e-8)
