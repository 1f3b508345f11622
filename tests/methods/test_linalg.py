"""Products and inverses against NumPy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.linalg import (
    Factor,
    by_halves,
    eliminate,
    eliminate_blocks,
    inverse,
    solve_cholesky,
)
from tests.helpers import oracles


def positive(n: int, ridge: float) -> np.ndarray:
    x = oracles.correlated(np.random.default_rng(n), 3 * n, n)
    gram = x.T @ x
    scale = np.sqrt(np.diag(gram))
    return gram / np.outer(scale, scale) + ridge * np.eye(n)


FACTORS = {"cpu": eliminate, "tpu": eliminate_blocks, "default": solve_cholesky}
"""Platform -> how what is not halved is factorized there."""


@pytest.mark.parametrize("n", [1, 129, 300])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_inverse(n: int, dtype: type) -> None:
    require_inverse(
        positive(n, 1.0), np.asarray(inverse(jnp.asarray(positive(n, 1.0), dtype))), dtype
    )


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("n", "leaf"), [(7, 1), (300, 80)])
def test_inverse_by_halves(n: int, leaf: int, factor: Factor) -> None:
    for dtype in (np.float64, np.float32):
        matrix = positive(n, 1.0)
        require_inverse(
            matrix, np.asarray(by_halves(jnp.asarray(matrix, dtype), leaf, factor)), dtype
        )


def require_inverse(matrix: np.ndarray, found: np.ndarray, dtype: type) -> None:
    assert found.dtype == dtype
    np.testing.assert_allclose(
        matrix @ found, np.eye(len(matrix)), atol=1e-11 if dtype == np.float64 else 2e-5
    )


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("rank", [1, 10])
def test_float32_inverses_are_as_accurate_as_a_factorizations(rank: int, factor: Factor) -> None:
    """Inputs of few directions and some noise, like an attention output's: inverting quarters loses
    all digits here."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(900, rank)) @ generator.normal(
        size=(rank, 300)
    ) + 0.01 * generator.normal(size=(900, 300))
    gram = x.T @ x
    scale = np.sqrt(np.diag(gram))
    matrix = gram / np.outer(scale, scale) + 1.1 * np.eye(300)

    def residual(found: np.ndarray) -> float:
        return float(np.linalg.norm(matrix @ found.astype(np.float64) - np.eye(300)))

    lower = np.linalg.inv(np.linalg.cholesky(matrix.astype(np.float32)))
    for leaf in (40, 300):
        found = np.asarray(by_halves(jnp.asarray(matrix, jnp.float32), leaf, factor))
        assert residual(found) < 2 * residual(lower.T @ lower)


def test_inverse_of_an_ill_conditioned_matrix() -> None:
    matrix = positive(200, 1e-7)
    assert np.linalg.cond(matrix) > 1e5
    np.testing.assert_allclose(
        matrix @ np.asarray(inverse(jnp.asarray(matrix))), np.eye(200), atol=1e-8
    )
