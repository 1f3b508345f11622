"""Routing to experts, products by blocks, and their gradients, against plain loops over experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods import gram
from jaxprune.models.common.expert_dispatch import (
    EMPTY,
    Routed,
    block_size,
    collect,
    dispatch,
    grouped,
    plan,
)

CASES = [(1, 1, 1), (64, 4, 16), (300, 2, 3)]
"""Tokens, experts a token takes, experts."""


def routed(
    tokens: int, k: int, experts: int, *, uneven: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and shares; where uneven, the first expert gets all it can, and the last one
    nothing."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(tokens, experts)) - uneven * 100 * np.arange(experts)
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    return chosen, generator.random((tokens, k), np.float32)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_every_choice_has_a_row_of_its_expert(
    tokens: int, k: int, experts: int, uneven: bool
) -> None:
    chosen, _ = routed(tokens, k, experts, uneven=uneven)
    way = jax.device_get(plan(jnp.asarray(chosen), experts))
    rows = way.choice.reshape(-1)
    np.testing.assert_array_equal(rows[way.row.reshape(-1)], np.arange(tokens * k))
    assert np.count_nonzero(rows < EMPTY) == tokens * k
    owner = np.repeat(way.owner, way.choice.shape[1])
    np.testing.assert_array_equal(owner[way.row], chosen)
    assert (np.diff(way.owner) >= 0).all()
    assert way.choice.size <= tokens * k + experts * block_size(tokens * k, experts)


@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_a_mixture_and_its_gradients_are_those_of_a_loop(tokens: int, k: int, experts: int) -> None:
    chosen, share = routed(tokens, k, experts)
    generator = np.random.default_rng(1)
    x, kernels = generator.normal(size=(tokens, 6)), generator.normal(size=(experts, 6, 4))

    def by_blocks(x: jax.Array, kernels: jax.Array, share: jax.Array) -> jax.Array:
        way = plan(jnp.asarray(chosen), experts)
        y = collect(grouped(dispatch(x, way, None), kernels, way.owner, "highest", None), way, None)
        return jnp.sum(jnp.sin(jnp.sum(y * share[:, :, None], axis=1)))

    def by_loop(x: jax.Array, kernels: jax.Array, share: jax.Array) -> jax.Array:
        y = jnp.einsum("tn,tknm->tkm", x, kernels[chosen], precision="highest")
        return jnp.sum(jnp.sin(jnp.sum(y * share[:, :, None], axis=1)))

    arguments = jnp.asarray(x), jnp.asarray(kernels), jnp.asarray(share, jnp.float64)
    found, expected = (
        jax.value_and_grad(one, argnums=(0, 1, 2))(*arguments) for one in (by_blocks, by_loop)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected
    )


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 2), (4, 1)])
def test_gram_matrices_of_experts_are_those_of_their_tokens(first: int, count: int) -> None:
    chosen, share = routed(90, 2, 5)
    x = np.random.default_rng(1).normal(size=(90, 7)).astype(np.float32)
    way = plan(jnp.asarray(chosen), 5)
    tap = Routed(dispatch(jnp.asarray(x), way, None), way, jnp.asarray(share))
    group = way.owner - jnp.int32(first)
    group = jnp.where(group < count, group, jnp.int32(-1))
    zeros = jnp.zeros((count, 7, 7), jnp.float32)
    found = jax.jit(gram.add_grouped)(zeros, tap.x, tap.weights(), group)
    for expert in range(first, first + count):
        weights = np.where(chosen == expert, share, 0).sum(axis=1) ** 2
        expected = x.T @ (weights[:, None] * x)
        np.testing.assert_allclose(
            gram.symmetric(found[expert - first]), expected, rtol=1e-5, atol=1e-5
        )
