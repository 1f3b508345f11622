"""What holds for every method, tested on every file of the package."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import methods
from jaxprune.errors import InputError
from jaxprune.methods import Crossed
from jaxprune.patterns import Unstructured, parse
from tests import oracles

NAMES = methods.names()
PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.0),
    ("unstructured", 0.99),
    ("per-output", 0.7),
    ("2:4", 0.5),
    ("1:8", 0.875),
]
N, M = 40, 24


def problem(tokens: int = 300, seed: int = 0) -> tuple[jnp.ndarray, jnp.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, tokens, N)
    weight = generator.normal(size=(N, M))
    return jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(weight, jnp.float32)


def error(gram: jnp.ndarray, dense: jnp.ndarray, weight: jnp.ndarray) -> float:
    g, d, w = (np.asarray(a, np.float64) for a in (gram, dense, weight))
    return float(np.sum((d - w) * (g @ (d - w))) / np.sum(d * (g @ d)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("tokens", [300, 20])
def test_counts_are_exact_and_weights_finite(name: str, pattern: str, sparsity: float, tokens: int) -> None:
    gram, weight = problem(tokens)
    method = methods.load(name)()
    solution = method.solve(method.prepare(gram), weight, parse(pattern, sparsity))
    mask = np.asarray(solution.mask)
    assert (np.asarray(solution.weight)[~mask] == 0).all()
    assert np.isfinite(solution.weight).all()
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        assert (mask.reshape(N // m, m, M).sum(axis=1) == n).all()
    elif pattern == "per-output":
        assert ((~mask).sum(axis=0) == round(sparsity * N)).all()
    else:
        assert (~mask).sum() == round(sparsity * N * M)


@pytest.mark.parametrize("name", NAMES)
def test_updating_is_not_worse_than_masking(name: str) -> None:
    gram, weight = problem()
    method = methods.load(name)()
    solution = method.solve(method.prepare(gram), weight, Unstructured(0.6))
    masked = jnp.where(solution.mask, weight, jnp.zeros_like(weight))
    assert error(gram, weight, solution.weight) <= error(gram, weight, masked) * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_given_mask_is_kept(name: str) -> None:
    gram, weight = problem()
    method = methods.load(name)()
    mask = jnp.asarray(np.random.default_rng(1).random((N, M)) < 0.3)
    solution = method.solve(method.prepare(gram), weight, Unstructured(0.5), mask)
    np.testing.assert_array_equal(solution.mask, mask)
    assert (np.asarray(solution.weight)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_outputs_permutes_the_solution(name: str) -> None:
    gram, weight = problem()
    order = np.random.default_rng(2).permutation(M)
    method = methods.load(name)()
    prepared = method.prepare(gram)
    solution = method.solve(prepared, weight, Unstructured(0.5))
    permuted = method.solve(prepared, weight[:, order], Unstructured(0.5))
    np.testing.assert_array_equal(permuted.mask, solution.mask[:, order])
    np.testing.assert_allclose(permuted.weight, solution.weight[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"magnitude"}))
def test_rescaling_an_input_does_not_change_the_pruned_function(name: str) -> None:
    # Magnitude is left out: it is not meant to have this property.
    gram, weight = problem()
    factor = jnp.asarray(2.0 ** np.random.default_rng(3).integers(-3, 4, N), jnp.float32)[:, None]
    method = methods.load(name)()
    solution = method.solve(method.prepare(gram), weight, Unstructured(0.5))
    scaled = method.solve(method.prepare(gram * factor * factor.T), weight / factor, Unstructured(0.5))
    np.testing.assert_array_equal(scaled.mask, solution.mask)
    np.testing.assert_allclose(scaled.weight * factor, solution.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_do_no_harm(name: str) -> None:
    gram, weight = problem()
    alive = jnp.asarray(np.arange(N) % 5 != 0)
    gram = jnp.where(alive[:, None] & alive[None, :], gram, jnp.zeros_like(gram))
    method = methods.load(name)()
    for g in (gram, jnp.zeros_like(gram)):
        solution = method.solve(method.prepare(g), weight, Unstructured(0.5))
        assert np.isfinite(solution.weight).all()
        assert int(jnp.sum(~solution.mask)) == N * M // 2


@pytest.mark.parametrize("selector", NAMES)
@pytest.mark.parametrize("updater", NAMES)
def test_any_mask_meets_any_update(selector: str, updater: str) -> None:
    gram, weight = problem()
    first, second = methods.load(selector)(), methods.load(updater)()
    crossed = Crossed(first, second)
    solution = crossed.solve(crossed.prepare(gram), weight, Unstructured(0.5))
    own = first.solve(first.prepare(gram), weight, Unstructured(0.5))
    np.testing.assert_array_equal(solution.mask, own.mask)


@pytest.mark.parametrize("name", NAMES)
def test_methods_are_hashable_options(name: str) -> None:
    assert hash(methods.load(name)()) == hash(methods.load(name)())


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean wanda"):
        methods.load("wnda")
