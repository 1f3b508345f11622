"""Conjugate gradients against column-by-column least squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.admm import ADMM
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.methods.gram import relative_error
from jaxprune.methods.wanda import Wanda
from jaxprune.sparsity.patterns import Unstructured
from tests.helpers import oracles

N, M = 48, 20


def problem(seed: int = 0, tokens: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, tokens, N)
    return x.T @ x, generator.normal(size=(N, M)), generator.random((N, M)) < 0.4


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1])
def test_it_is_least_squares_on_the_kept_weights(damping: float) -> None:
    gram, weight, mask = problem()
    method = Exact(damping=damping, tolerance=1e-12)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    expected = oracles.masked_least_squares(gram, weight, mask, damping=damping)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-6, atol=1e-9)
    assert solution.metrics["cg_residual"] <= 1e-12
    assert solution.metrics["cg_steps"] < 500


# 20 tokens: a singular Gram matrix, and many optima
@pytest.mark.parametrize("tokens", [200, 60, 20])
def test_no_update_has_a_smaller_error(tokens: int) -> None:
    gram, weight, mask = (jnp.asarray(a) for a in problem(1, tokens))
    gram, weight = gram.astype(jnp.float32), weight.astype(jnp.float32)
    best = oracles.masked_least_squares(
        np.asarray(gram, np.float64) + 1e-9 * np.eye(N),
        np.asarray(weight, np.float64),
        np.asarray(mask),
        0.0,
    )
    method = Exact()
    solution = method.solve(method.prepare(gram), weight, mask)
    found, least = (
        float(relative_error(gram.astype(float), weight.astype(float), jnp.asarray(w, float)))
        for w in (solution.weight, best)
    )
    assert found <= least * 1.001 + 1e-7
    longer = ADMM(iterations=200)
    assert found <= float(
        relative_error(gram, weight, longer.solve(longer.prepare(gram), weight, mask).weight)
    )


def test_a_finish_keeps_the_mask_and_lowers_the_error_step_by_step() -> None:
    gram, weight, _ = (jnp.asarray(a) for a in problem(2))
    plain = ADMM().solve(ADMM().prepare(gram), weight, Unstructured(0.6))
    errors = [float(relative_error(gram, weight, plain.weight))]
    for steps in (1, 3, 10, 400):
        method = Finished(ADMM(), Exact(steps=steps))
        solution = method.solve(method.prepare(gram), weight, Unstructured(0.6))
        np.testing.assert_array_equal(solution.mask, plain.mask)
        errors.append(float(relative_error(gram, weight, solution.weight)))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors
    assert solution.metrics.keys() == {"primal_residual", "cg_steps", "cg_residual"}


def test_each_output_rests_once_it_is_done() -> None:
    gram, weight, mask = problem(3)
    method = Exact(tolerance=1e-3)
    prepared = method.prepare(jnp.asarray(gram))
    together = method.solve(prepared, jnp.asarray(weight), jnp.asarray(mask)).weight
    for column in (0, 7):
        alone = method.solve(
            prepared, jnp.asarray(weight[:, [column]]), jnp.asarray(mask[:, [column]])
        ).weight
        np.testing.assert_allclose(together[:, [column]], alone, rtol=1e-10, atol=1e-13)


def test_without_a_mask_it_takes_wandas() -> None:
    gram, weight, _ = (jnp.asarray(a) for a in problem(4))
    crossed, method = Crossed(Wanda(), Exact()), Exact()
    pattern = Unstructured(0.5, per_output=True)
    expected = crossed.solve(crossed.prepare(gram), weight, pattern)
    solution = method.solve(method.prepare(gram), weight, pattern)
    np.testing.assert_array_equal(solution.mask, expected.mask)
    np.testing.assert_array_equal(solution.weight, expected.weight)
