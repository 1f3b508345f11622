"""ALPS against a float64 NumPy transcription, its objective, and ADMM-Grad."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.admm import ADMM
from jaxprune.methods.alps import ALPS
from jaxprune.methods.gram import relative_error
from jaxprune.sparsity.patterns import parse_pattern
from tests.helpers import oracles

N, M = 48, 20


def problem(seed: int = 0, n: int = N, m: int = M) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.decaying(generator, 5 * n, n)
    return x.T @ x, generator.normal(size=(n, m))


@pytest.mark.parametrize("iterations", [3, 7, 30, 300])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.6), ("per-output", 0.5), ("2:4", 0.5)]
)
def test_it_is_the_papers(pattern: str, sparsity: float, iterations: int) -> None:
    gram, weight = problem()
    method = ALPS(iterations=iterations)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), parse_pattern(pattern, sparsity)
    )
    expected, mask = oracles.alps(gram, weight, pattern, sparsity, iterations=iterations)
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-6, atol=1e-9)


def test_a_support_that_does_not_move_lowers_the_penalty() -> None:
    # With a penalty this large little changes at first, so rho falls by fives, with a fresh start
    # after each change.
    gram, weight = problem(1)
    method = ALPS(rho=1e4)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), parse_pattern("unstructured", 0.7)
    )
    expected, mask = oracles.alps(gram, weight, "unstructured", 0.7, rho=1e4)
    assert solution.metrics["rho"] < 1e4 / 5**4
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5)]
)
def test_the_objective_decreases(pattern: str, sparsity: float) -> None:
    gram, weight = (jnp.asarray(a) for a in problem(2, 96, 40))
    method = ALPS()
    prepared = method.prepare(gram)

    def error(**options: int) -> float:
        solution = ALPS(**options).solve(prepared, weight, parse_pattern(pattern, sparsity))
        return float(relative_error(gram, weight, solution.weight))

    by_search = [error(iterations=k) for k in (3, 9, 18, 30, 60)]
    assert all(
        after <= before * 1.01 for before, after in zip(by_search, by_search[1:], strict=False)
    ), by_search
    assert by_search[-1] < 0.95 * by_search[0]

    def damped(solution_weight: jnp.ndarray) -> float:
        scale = prepared.scale[:, None]
        difference = scale * (weight - solution_weight)
        return float(jnp.vdot(difference, prepared.gram @ difference))

    by_finish = [
        damped(
            ALPS(cg_steps=k, cg_tolerance=0.0)
            .solve(prepared, weight, parse_pattern(pattern, sparsity))
            .weight
        )
        for k in range(11)
    ]
    assert all(after < before for before, after in zip(by_finish, by_finish[1:], strict=False)), (
        by_finish
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("unstructured", 0.5), ("unstructured", 0.7), ("unstructured", 0.9), ("2:4", 0.5)],
)
def test_its_error_is_at_or_below_that_of_gradual_admm(
    pattern: str, sparsity: float, seed: int
) -> None:
    gram, weight = (jnp.asarray(a, jnp.float32) for a in problem(10 + seed, 96, 64))
    errors = {}
    for method in (ALPS(), ADMM(schedule="cubic"), ADMM(schedule="constant")):
        solution = method.solve(method.prepare(gram), weight, parse_pattern(pattern, sparsity))
        errors[method] = float(relative_error(gram, weight, solution.weight))
    assert errors[ALPS()] == min(errors.values())


def test_a_given_mask_is_finished_from_the_dense_weights() -> None:
    gram, weight = problem(3)
    mask = np.random.default_rng(4).random(weight.shape) < 0.5
    method = ALPS(cg_steps=500, cg_tolerance=1e-10)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    ridged = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(N)
    exact = oracles.masked_least_squares(ridged, weight, mask, damping=0.0)
    np.testing.assert_allclose(solution.weight, exact, rtol=1e-5, atol=1e-7)
