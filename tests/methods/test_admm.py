"""The solver against a NumPy float64 transcription of the paper, and against the exact optimum."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.methods.admm import ADMM
from jaxprune.sparsity.patterns import NM, Unstructured, parse_pattern
from tests.helpers import oracles

N, M = 48, 20


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, 200, N)
    return x.T @ x, generator.normal(size=(N, M))


@pytest.mark.parametrize("linear_solve", ["inverse", "cholesky"])
@pytest.mark.parametrize("pattern", ["unstructured", "per-output", "2:4", "1:3"])
@pytest.mark.parametrize("schedule", ["cubic", "constant"])
def test_every_iteration_is_the_papers(schedule: str, pattern: str, linear_solve: str) -> None:
    gram, weight = problem()
    sparsity = {"2:4": 0.5, "1:3": 2 / 3}.get(pattern, 0.6)
    every = pattern == "unstructured" and linear_solve == "inverse"
    for iterations in range(1, 21) if every else (2, 15, 20):
        method = ADMM(
            schedule=schedule,
            iterations=iterations,
            selections=min(15, iterations),
            linear_solve=linear_solve,
        )
        solution = method.solve(
            method.prepare(jnp.asarray(gram)), jnp.asarray(weight), parse_pattern(pattern, sparsity)
        )
        expected, mask = oracles.admm(
            gram,
            weight,
            pattern,
            sparsity,
            schedule=schedule,
            iterations=iterations,
            selections=min(15, iterations),
        )
        np.testing.assert_array_equal(solution.mask, mask)
        np.testing.assert_allclose(solution.weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("damping", "rho"), [(0.1, 1.0), (0.0, 1.0), (0.01, 0.3)])
def test_other_parameters_and_fixed_masks(damping: float, rho: float) -> None:
    gram, weight = problem(1)
    mask = np.random.default_rng(2).random(weight.shape) < 0.4
    method = ADMM(damping=damping, rho=rho, iterations=7, selections=0)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    expected, _ = oracles.admm(
        gram,
        weight,
        "",
        0,
        schedule="",
        iterations=7,
        selections=0,
        damping=damping,
        rho=rho,
        mask=mask,
    )
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("linear_solve", ["inverse", "cholesky"])
def test_a_fixed_mask_converges_to_the_exact_optimum(linear_solve: str) -> None:
    gram, weight = problem(3)
    mask = np.random.default_rng(4).random(weight.shape) < 0.5
    method = ADMM(iterations=5000, linear_solve=linear_solve)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    exact = oracles.masked_least_squares(gram, weight, mask, damping=0.1)
    np.testing.assert_allclose(solution.weight, exact, rtol=1e-6, atol=1e-9)
    assert solution.metrics["primal_residual"] < 1e-7


def test_float32_is_close_to_float64() -> None:
    gram, weight = problem(5)
    method = ADMM()
    solution = method.solve(
        method.prepare(jnp.asarray(gram, jnp.float32)),
        jnp.asarray(weight, jnp.float32),
        Unstructured(0.5),
    )
    expected, mask = oracles.admm(
        gram, weight, "unstructured", 0.5, schedule="cubic", iterations=20, selections=15
    )
    assert solution.weight.dtype == jnp.float32
    assert np.mean(np.asarray(solution.mask) != mask) < 0.01
    same = np.asarray(solution.mask) == mask
    np.testing.assert_allclose(
        np.asarray(solution.weight)[same], expected[same], rtol=5e-3, atol=5e-3
    )


def test_no_selections_is_one_shot_from_the_dense_weights() -> None:
    gram, weight = problem(6)
    method = ADMM(selections=0)
    solution = method.solve(method.prepare(jnp.asarray(gram)), jnp.asarray(weight), NM(2, 4))
    expected, mask = oracles.admm(gram, weight, "2:4", 0, schedule="", iterations=20, selections=0)
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-9, atol=1e-12)


def test_iterations_are_a_loop_to_the_compiler() -> None:
    gram, weight = problem()
    sizes = []
    for iterations in (20, 200):
        method = ADMM(iterations=iterations)
        prepared = method.prepare(jnp.asarray(gram))
        jaxpr = jax.make_jaxpr(lambda p, w, m=method: m.solve(p, w, Unstructured(0.5)))(
            prepared, jnp.asarray(weight)
        )
        sizes.append(len(str(jaxpr)))
    assert abs(sizes[0] - sizes[1]) < 50


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"selections": -1},
        {"damping": -1.0},
        {"rho": 0.0},
        {"schedule": "linear"},
        {"linear_solve": "lu"},
    ],
)
def test_impossible_options_are_errors(options: dict) -> None:
    # Under these tests' type checker a wrong choice may be a type error first.
    with pytest.raises((InputError, jaxtyping.TypeCheckError)):
        ADMM(**options)
