import jax.numpy as jnp
import numpy as np

from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.wanda import Wanda
from jaxprune.sparsity.patterns import Unstructured


def test_wanda_scores_by_magnitude_and_input_norm() -> None:
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(100, 8)) * np.arange(1, 9), generator.normal(size=(8, 6))
    method = Wanda()
    solution = method.solve(
        method.prepare(jnp.asarray(x.T @ x)), jnp.asarray(w), Unstructured(0.5, per_output=True)
    )
    scores = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    expected = scores >= np.sort(scores, axis=0)[4]
    np.testing.assert_array_equal(solution.mask, expected)
    np.testing.assert_array_equal(solution.weight, w * expected)


def test_magnitude_ignores_the_inputs() -> None:
    w = np.random.default_rng(1).normal(size=(8, 6))
    method = Magnitude()
    solution = method.solve(method.prepare(jnp.eye(8)), jnp.asarray(w), Unstructured(0.25))
    expected = np.abs(w) >= np.sort(np.abs(w).ravel())[12]
    np.testing.assert_array_equal(solution.mask, expected)
    np.testing.assert_array_equal(solution.weight, w * expected)
