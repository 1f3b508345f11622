"""What holds for every method, tested on every file of the package and on the documentation's
example."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import methods
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.methods import gram as stats
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.solve.kernel import Linear, prune_and_round
from jaxprune.sparsity.patterns import Pattern, Unstructured, parse_pattern
from tests.helpers import oracles

sys.path.append(str(Path(__file__).parents[2] / "docs/extending/example"))
from jaxprune_example.rescaled import Rescaled  # noqa: E402

METHODS: dict[str, Method] = {name: methods.load(name)() for name in methods.names()} | {
    "sparsegpt, small blocks": SparseGPT(block=16),
    "sgd": methods.load("gradient")(optimizer="sgd"),
    "admm, finished": Finished(methods.load("admm")(), Exact(steps=10)),
    "wanda's mask, exact": Crossed(methods.load("wanda")(), Exact()),
    "the documentation's example": Rescaled(),
}
PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.0),
    ("unstructured", 0.99),
    ("per-output", 0.7),
    ("2:4", 0.5),
    ("1:8", 0.875),
    ("2:5", 0.6),
]
SCALE_FREE = sorted(METHODS.keys() - {"magnitude", "sparsegpt", "sparsegpt, small blocks", "alps"})
"""Magnitude looks at no inputs; SparseGPT and ALPS add a ridge in the inputs' own units, as
published."""
N, M = 40, 24  # 40 is no multiple of 16 or 128

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def problem(tokens: int = 300, seed: int = 0) -> tuple[jnp.ndarray, jnp.ndarray]:
    generator = np.random.default_rng(seed)
    x = oracles.correlated(generator, tokens, N)
    weight = generator.normal(size=(N, M))
    return jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(weight, jnp.float32)


def error(gram: jnp.ndarray, dense: jnp.ndarray, weight: jnp.ndarray) -> float:
    g, d, w = (np.asarray(a, np.float64) for a in (gram, dense, weight))
    return float(np.sum((d - w) * (g @ (d - w))) / np.sum(d * (g @ d)))


def require_exact(mask: np.ndarray, pattern: Pattern) -> None:
    """Every count of the pattern is met to the last weight."""
    n, m = mask.shape
    if pattern.group:
        kept = round((1 - pattern.sparsity) * pattern.group)
        assert (mask.reshape(-1, pattern.group, m).sum(axis=1) == kept).all()
    elif pattern.per_output:
        assert ((~mask).sum(axis=0) == round(pattern.sparsity * n)).all()
    else:
        assert (~mask).sum() == round(pattern.sparsity * n * m)


@every_method
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("tokens", [300, 20])  # 20 tokens: a singular Gram matrix
def test_counts_are_exact_and_weights_finite(
    method: Method, pattern: str, sparsity: float, tokens: int
) -> None:
    gram, weight = problem(tokens)
    wanted = parse_pattern(pattern, sparsity)
    solution = method.solve(method.prepare(gram), weight, wanted)
    mask = np.asarray(solution.mask)
    assert (np.asarray(solution.weight)[~mask] == 0).all()
    assert np.isfinite(solution.weight).all()
    assert all(np.isfinite(value) for value in solution.metrics.values())
    require_exact(mask, wanted)
    if sparsity == 0:
        np.testing.assert_allclose(solution.weight, weight, rtol=1e-3, atol=1e-3)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "per-output", "2:4"])
def test_16_bit_activations_and_weights(method: Method, pattern: str) -> None:
    generator = np.random.default_rng(4)
    x = jnp.asarray(oracles.correlated(generator, 200, N), jnp.bfloat16)
    kernel = jnp.asarray(generator.normal(size=(N, M)), jnp.bfloat16)
    gram, wanted = stats.gram(x), parse_pattern(pattern, 0.5)
    stored, mask, result = prune_and_round(
        method, method.prepare(gram), gram, kernel, Linear(lambda: kernel, wanted)
    )
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored != 0, mask)
    require_exact(np.asarray(mask), wanted)
    masked = jnp.where(mask, kernel, jnp.zeros_like(kernel)).astype(jnp.float32)
    assert result.error <= error(gram, kernel, masked) * 1.01


@every_method
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_updating_is_not_worse_than_masking(method: Method, pattern: str, sparsity: float) -> None:
    gram, weight = problem()
    solution = method.solve(method.prepare(gram), weight, parse_pattern(pattern, sparsity))
    masked = jnp.where(solution.mask, weight, jnp.zeros_like(weight))
    # SparseGPT settles inputs one after another, damped: with next to nothing kept it may lose a
    # little.
    slack = 1e-3 if isinstance(method, SparseGPT) else 1e-6
    assert error(gram, weight, solution.weight) <= error(gram, weight, masked) * (1 + slack) + 1e-9


@every_method
def test_a_given_mask_is_kept(method: Method) -> None:
    gram, weight = problem()
    mask = jnp.asarray(np.random.default_rng(1).random((N, M)) < 0.3)
    solution = method.solve(method.prepare(gram), weight, mask)
    np.testing.assert_array_equal(solution.mask, mask)
    assert (np.asarray(solution.weight)[~np.asarray(mask)] == 0).all()
    masked = jnp.where(mask, weight, jnp.zeros_like(weight))
    assert error(gram, weight, solution.weight) <= error(gram, weight, masked) * (1 + 1e-6)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_permuting_the_outputs_permutes_the_solution(method: Method, pattern: str) -> None:
    gram, weight = problem()
    order = np.random.default_rng(2).permutation(M)
    prepared = method.prepare(gram)
    solution = method.solve(prepared, weight, parse_pattern(pattern))
    permuted = method.solve(prepared, weight[:, order], parse_pattern(pattern))
    np.testing.assert_array_equal(permuted.mask, solution.mask[:, order])
    np.testing.assert_allclose(permuted.weight, solution.weight[:, order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_rescaling_an_input_does_not_change_the_pruned_function(name: str) -> None:
    method = METHODS[name]
    gram, weight = problem()
    factor = jnp.asarray(2.0 ** np.random.default_rng(3).integers(-3, 4, N), jnp.float32)[:, None]
    solution = method.solve(method.prepare(gram), weight, Unstructured(0.5))
    scaled = method.solve(
        method.prepare(gram * factor * factor.T), weight / factor, Unstructured(0.5)
    )
    np.testing.assert_array_equal(scaled.mask, solution.mask)
    np.testing.assert_allclose(scaled.weight * factor, solution.weight, rtol=1e-3, atol=1e-3)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "per-output", "2:4"])
def test_dead_inputs_do_no_harm(method: Method, pattern: str) -> None:
    gram, weight = problem()
    alive = jnp.asarray(np.arange(N) % 5 != 0)
    gram = jnp.where(alive[:, None] & alive[None, :], gram, jnp.zeros_like(gram))
    for g in (gram, jnp.zeros_like(gram)):
        solution = method.solve(method.prepare(g), weight, parse_pattern(pattern, 0.5))
        assert np.isfinite(solution.weight).all()
        require_exact(np.asarray(solution.mask), parse_pattern(pattern, 0.5))


@pytest.mark.parametrize("selector", methods.names())
@pytest.mark.parametrize("updater", methods.names())
def test_any_mask_meets_any_update(selector: str, updater: str) -> None:
    gram, weight = problem()
    first, second = methods.load(selector)(), methods.load(updater)()
    crossed = Crossed(first, second)
    solution = crossed.solve(crossed.prepare(gram), weight, Unstructured(0.5))
    own = first.solve(first.prepare(gram), weight, Unstructured(0.5))
    np.testing.assert_array_equal(solution.mask, own.mask)
    alone = second.solve(second.prepare(gram), weight, own.mask)
    np.testing.assert_array_equal(solution.weight, alone.weight)


@every_method
def test_it_is_one_loop_to_the_compiler(method: Method) -> None:
    """Twice the inputs and four times the outputs, or more steps, don't give the compiler a longer
    program.

    ADMM's inverse by halves does grow, up to 64 leaves at 8192 inputs.
    """

    def size(method: Method, n: int, m: int) -> int:
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, n), (n, m)))
        solve = jax.make_jaxpr(lambda g, w: method.solve(method.prepare(g), w, Unstructured(0.5)))
        return str(solve(*shapes)).count(" = ")

    assert abs(size(method, 8192, 32) - size(method, 16384, 128)) < 20
    counts = {f.name for f in dataclasses.fields(method)} & {"steps", "iterations", "cg_steps"}
    for name in counts:
        assert (
            abs(size(dataclasses.replace(method, **{name: 77}), 256, 32) - size(method, 256, 32))
            < 20
        )


@every_method
def test_methods_are_hashable_options(method: Method) -> None:
    assert hash(method) == hash(dataclasses.replace(method))


@every_method
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_every_number_must_be_one_that_solves(value: float, method: Method) -> None:
    for field in dataclasses.fields(method):
        if field.type is float:
            with pytest.raises(InputError, match=f"{field.name}.* must be finite"):
                dataclasses.replace(method, **{field.name: value})


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean wanda"):
        methods.load("wnda")
