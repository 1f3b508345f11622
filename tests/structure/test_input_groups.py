"""The choice of inputs and the re-optimization of the others, against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structure.input_groups import METHOD, optimum, remove_inputs, selected

RNG = np.random.default_rng(0)


def problem(n: int, m: int, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs' Gram matrix, and a kernel."""
    inputs = RNG.normal(size=(rows, n)) @ RNG.normal(size=(n, n)) * np.exp(RNG.normal(size=n))
    return inputs.T @ inputs, RNG.normal(size=(n, m))


def arrays(*given: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in given)


def damped(gram: np.ndarray) -> np.ndarray:
    """The Gram matrix with a ridge in proportion to its diagonal."""
    diagonal = np.diag(gram)
    return gram + METHOD.damping * np.diag(diagonal)


def best(gram: np.ndarray, kernel: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The kernel of least loss among those with zeros outside `rows`."""
    found = np.zeros_like(kernel)
    found[rows] = np.linalg.solve(gram[np.ix_(rows, rows)], gram[rows] @ kernel)
    return found


def loss(gram: np.ndarray, difference: np.ndarray) -> float:
    return float(np.sum(difference * (gram @ difference)))


def outputs(gram: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """How much the output changes without each group, squared."""
    size = len(gram) // groups
    found = []
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        found.append(loss(gram[rows, rows], kernel[rows]))
    return np.array(found)


def costs(gram: np.ndarray, kernel: np.ndarray, groups: int, keep: int) -> dict[tuple, float]:
    """Groups that stay -> the loss of the best kernel; of all choices."""
    size, found = len(gram) // groups, {}
    for some in itertools.combinations(range(groups), keep):
        rows = np.concatenate([np.arange(g * size, (g + 1) * size) for g in some])
        found[some] = loss(gram, kernel - best(gram, kernel, rows))
    return found


@pytest.mark.parametrize(("groups", "keep"), [(12, 8), (12, 11), (6, 3), (4, 1)])
def test_a_choice_is_among_the_best_and_its_kernel_is_optimal(groups: int, keep: int) -> None:
    gram, kernel = problem(12, 5)
    h = damped(gram)
    kept, weights, error = remove_inputs(*arrays(gram, kernel, outputs(h, kernel, groups)), keep)
    every = costs(h, kernel, groups, keep)
    assert len(kept) == keep and every[tuple(kept)] <= np.quantile([*every.values()], 0.1)
    rows = np.flatnonzero(np.repeat(np.isin(np.arange(groups), kept), 12 // groups))
    expected = best(h, kernel, rows)
    np.testing.assert_allclose(weights, expected[rows], rtol=2e-3, atol=2e-4)
    assert error == pytest.approx(
        loss(gram, kernel - expected) / loss(gram, kernel), rel=1e-3, abs=1e-6
    )


def test_many_groups_go_in_few_steps_and_exactly_as_many_as_wanted() -> None:
    gram, kernel = problem(300, 4, rows=900)
    for keep in (1, 137, 172, 299):
        alive = np.asarray(selected(keep, *arrays(gram, kernel, np.ones(300))))
        assert alive.sum() == keep


def test_dead_inputs_go_first_and_leave_no_nan() -> None:
    gram, kernel = problem(12, 3)
    gram[[2, 7]] = gram[:, [2, 7]] = 0
    changes = outputs(gram, kernel, 12)
    kept, weights, error = remove_inputs(*arrays(gram, kernel, changes), 10)
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert np.isfinite(weights).all() and 0 <= error < 1e-3


def test_without_inputs_the_kernel_stays_and_the_error_is_no_nan() -> None:
    gram, kernel = arrays(np.zeros((6, 6)), np.ones((6, 2)))
    weights, error = optimum(gram, kernel, jnp.arange(3))
    assert np.isfinite(jax.device_get(weights)).all() and float(error) == 0


def test_without_gradients_only_the_output_counts() -> None:
    gram, kernel = problem(24, 5)
    same = outputs(damped(gram), kernel, 24)
    some, others = (
        remove_inputs(*arrays(gram, kernel, changes), 15)[0] for changes in (np.zeros(24), same)
    )
    assert some.tolist() == others.tolist()


def test_a_group_that_the_loss_does_not_need_goes_first() -> None:
    gram, kernel = problem(24, 5)
    changes = outputs(damped(gram), kernel, 8)
    dearest = int(np.argmax(changes))
    changes[dearest] = 0
    kept, _, _ = remove_inputs(*arrays(gram, kernel, changes), 7)
    assert dearest not in kept
