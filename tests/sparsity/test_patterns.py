"""Masks have exact counts, break ties by index, and agree with a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.sparsity.patterns import NM, Unstructured, parse_pattern
from tests.helpers import oracles

SHAPES = [(16, 5), (24, 1), (64, 48)]
PATTERNS = ["unstructured", "per-output", "2:4", "1:4", "1:2", "3:8", "5:8"]


select = jax.jit(lambda selector, scores, step: selector(scores, step))


def scores_of(kind: str, shape: tuple[int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return {
        "distinct": lambda: generator.random(shape),
        "tied": lambda: generator.integers(0, 4, shape).astype(float),
        "equal": lambda: np.ones(shape),
        "zero": lambda: np.zeros(shape),
        "extreme": lambda: 10.0 ** generator.integers(-300, 300, shape),
        "clustered": lambda: np.where(
            generator.random(shape) < 0.5, 1 + 1e-6 * generator.random(shape), 1e30
        ),
    }[kind]()


@pytest.mark.parametrize("kind", ["distinct", "tied", "equal", "zero", "extreme", "clustered"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [*zip(SHAPES, (np.float32, np.float64, np.float32), strict=True)]
)
def test_mask_equals_that_of_a_sort(
    kind: str, pattern: str, shape: tuple[int, int], dtype: type
) -> None:
    if ":" in pattern and shape[0] % int(pattern[-1]):
        pytest.skip("the pattern does not divide the inputs")
    with np.errstate(over="ignore"):
        scores = np.minimum(scores_of(kind, shape).astype(dtype), np.finfo(dtype).max)
    for sparsity in (0.0, 0.3, 0.5, 0.99) if ":" not in pattern else (0.5,):
        progress = (0.1, 0.6, 1.0)
        selector = parse_pattern(pattern, None if ":" in pattern else sparsity).selector(
            shape, progress
        )
        for step, fraction in enumerate(progress):
            mask = select(selector, jnp.asarray(scores), jnp.asarray(step))
            np.testing.assert_array_equal(mask, oracles.select(scores, pattern, fraction, sparsity))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (15, 16)])
def test_every_group_keeps_exactly_n_of_m(n: int, m: int) -> None:
    scores = jnp.asarray(np.random.default_rng(1).integers(0, 3, (m * 6, 10)).astype(np.float32))
    mask = select(NM(n, m).selector(scores.shape), scores, 0)
    assert (np.asarray(mask).reshape(6, m, 10).sum(axis=1) == n).all()


def test_sparsities_of_one_shape_share_a_compilation() -> None:
    select = jax.jit(lambda selector, scores: selector(scores))
    scores = jnp.asarray(np.random.default_rng(2).random((8, 8)))
    for sparsity in (0.1, 0.5, 0.9):
        mask = select(Unstructured(sparsity).selector(scores.shape), scores)
        assert int(jnp.sum(~mask)) == round(64 * sparsity)
    assert select._cache_size() == 1


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2/4", "", "dense", "-1:4"])
def test_an_impossible_pattern_is_one_error(text: str) -> None:
    with pytest.raises(InputError, match="N:M"):
        parse_pattern(text, 0.5)


def test_impossible_shapes_and_sparsities_are_errors() -> None:
    with pytest.raises(InputError, match="divisible by 4.*has 10"):
        NM(2, 4).selector((10, 3))
    for sparsity in (-0.1, 1.0, 50.0, float("nan")):
        with pytest.raises(InputError, match="sparsity"):
            Unstructured(sparsity)
