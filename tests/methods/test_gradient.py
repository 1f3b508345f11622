"""Gradient descent against Adam and SGD written out in NumPy, and against the optimum."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.gradient import Gradient
from tests.helpers import oracles

N, M = 48, 20


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, 200, N)
    return x.T @ x, generator.normal(size=(N, M)), generator.random((N, M)) < 0.5


def descend(
    gram: np.ndarray,
    weight: np.ndarray,
    mask: np.ndarray,
    *,
    optimizer: str,
    steps: int,
    rate: float,
    damping: float,
) -> np.ndarray:
    scale = np.sqrt(np.diag(gram)) + 1e-8
    g = gram / np.outer(scale, scale)
    g = g + damping * np.mean(np.diag(g)) * np.eye(N)
    dense = scale[:, None] * weight
    unit = np.sqrt(np.mean(dense**2))
    dense = dense / unit
    w, first, second = dense * mask, np.zeros_like(dense), np.zeros_like(dense)
    for step in range(1, steps + 1):
        gradient = 2 * mask * (g @ (w - dense))
        if optimizer == "sgd":
            w = w - rate * gradient
            continue
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        w = w - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return w * unit / scale[:, None]


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.02), ("sgd", 0.01)])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_it_is_the_textbooks(optimizer: str, rate: float, steps: int) -> None:
    gram, weight, mask = problem()
    method = Gradient(optimizer=optimizer, steps=steps, learning_rate=rate, damping=0.05)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    expected = descend(
        gram, weight, mask, optimizer=optimizer, steps=steps, rate=rate, damping=0.05
    )
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.003), ("sgd", 0.02)])
def test_many_steps_reach_the_optimum(optimizer: str, rate: float) -> None:
    gram, weight, mask = problem(1)
    method = Gradient(optimizer=optimizer, steps=5000, learning_rate=rate)
    solution = method.solve(
        method.prepare(jnp.asarray(gram)), jnp.asarray(weight), jnp.asarray(mask)
    )
    exact = oracles.masked_least_squares(gram, weight, mask, damping=0.1)
    assert np.linalg.norm(solution.weight - exact) < 0.01 * np.linalg.norm(exact)
    assert solution.metrics["gradient"] < 0.01


def test_the_unit_of_the_activations_does_not_matter() -> None:
    gram, weight, mask = (jnp.asarray(a) for a in problem(2))
    method = Gradient()
    once, more = (
        method.solve(method.prepare(scale * gram), weight, mask).weight for scale in (1.0, 1e4)
    )
    np.testing.assert_allclose(once, more, rtol=1e-5, atol=1e-7)
