"""The gated delta rule in chunks against plain NumPy, token by token; a convolution; and texts in
one window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models.common.gated_delta_rule import Inputs, convolve, gated_delta_rule
from jaxprune.models.common.packed_windows import Layout


def inputs(length: int, seed: int = 0) -> Inputs:
    """Random ones in float64: two windows, two key heads, four memories."""
    generator = np.random.default_rng(seed)
    key, query = (generator.normal(size=(2, length, 2, 6)) for _ in range(2))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value, decay, rate = (generator.normal(size=(2, length, 4, *rest)) for rest in ((5,), (), ()))
    return Inputs(*map(jnp.asarray, (query, key, value, -np.abs(decay), 1 / (1 + np.exp(-rate)))))


def by_hand(given: Inputs) -> np.ndarray:
    query, key, value, decay, rate = map(np.asarray, given)
    out = np.zeros_like(value)
    for window, memory in np.ndindex(value.shape[0], value.shape[2]):
        state = np.zeros((key.shape[-1], value.shape[-1]))
        for t in range(value.shape[1]):
            k, b = key[window, t, memory // 2], rate[window, t, memory]
            state = np.exp(decay[window, t, memory]) * (state - b * np.outer(k, k @ state))
            state += b * np.outer(k, value[window, t, memory])
            out[window, t, memory] = state.T @ query[window, t, memory // 2]
    return out


@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
def test_chunks_are_the_recurrence(length: int) -> None:
    given = inputs(length)
    np.testing.assert_allclose(
        jax.jit(gated_delta_rule)(given), by_hand(given), rtol=1e-9, atol=1e-9
    )


def layout(lengths: list[tuple[int, int, int]]) -> Layout:
    """Of parts: length, group and branch."""
    ends: dict[int, int] = {}
    rows = []
    for length, group, branch in lengths:
        start = ends.get(group, 0) if branch else 0
        rows += [(start + i, group, branch) for i in range(length)]
        if not branch:
            ends[group] = length
    return Layout(
        *(np.array(column, np.int32)[None].repeat(2, 0) for column in zip(*rows, strict=True))
    )


PARTS = [(6, 0, 0), (6, 0, 1), (6, 0, 2), (6, 1, 0), (6, 2, 1), (6, 3, 0), (6, 3, 1)]
"""Texts of a window; one has no common beginning."""


def test_texts_that_share_a_window_are_as_if_alone() -> None:
    given, packed = inputs(42), layout(PARTS)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)))
    features = jnp.asarray(np.random.default_rng(2).normal(size=(2, 42, 8)))
    found, convolved = gated_delta_rule(given, packed), convolve(features, kernel, packed)
    starts = np.cumsum([0, *(length for length, _, _ in PARTS)])
    for number, (length, group, branch) in enumerate(PARTS):
        rows = list(range(starts[number], starts[number] + length))
        before = [i for i, (_, g, b) in enumerate(PARTS) if g == group and b == 0 and branch]
        shared = [row for i in before for row in range(starts[i], starts[i] + PARTS[i][0])]
        text = np.array(shared + rows)
        alone = gated_delta_rule(jax.tree.map(lambda x, text=text: x[:, text], given))
        np.testing.assert_allclose(found[:, rows], alone[:, len(shared) :], rtol=1e-9, atol=1e-9)
        single = convolve(features[:, text], kernel, None)
        np.testing.assert_allclose(
            convolved[:, rows], single[:, len(shared) :], rtol=1e-12, atol=1e-12
        )


def test_a_convolution_sees_the_tokens_before() -> None:
    x, kernel = np.arange(10.0).reshape(1, 5, 2), np.array([[1.0, 10, 100], [0, 0, 1]])
    found = convolve(jnp.asarray(x), jnp.asarray(kernel), None)
    expected = [
        sum(w * (x[0, t - lag, 0] if t >= lag else 0) for lag, w in enumerate((100, 10, 1)))
        for t in range(5)
    ]
    np.testing.assert_allclose(found[0, :, 0], expected)
    np.testing.assert_allclose(found[0, :, 1], x[0, :, 1])
