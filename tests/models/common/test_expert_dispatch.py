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
    dispatch_plan,
    grouped,
)

CASES = [(1, 1, 1), (64, 4, 16), (300, 2, 3)]
"""Tokens, experts a token takes, experts."""


def routed(
    tokens: int, k: int, experts: int, *, uneven: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and routing weights; where uneven, the first expert gets all it can, and the
    last one nothing."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(tokens, experts)) - uneven * 100 * np.arange(experts)
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    return chosen, generator.random((tokens, k), np.float32)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_every_assignment_has_a_slot_of_its_expert(
    tokens: int, k: int, experts: int, uneven: bool
) -> None:
    chosen, _ = routed(tokens, k, experts, uneven=uneven)
    plan = jax.device_get(dispatch_plan(jnp.asarray(chosen), experts))
    rows = plan.assignments.reshape(-1)
    np.testing.assert_array_equal(rows[plan.slots.reshape(-1)], np.arange(tokens * k))
    assert np.count_nonzero(rows < EMPTY) == tokens * k
    expert_ids = np.repeat(plan.expert_ids, plan.assignments.shape[1])
    np.testing.assert_array_equal(expert_ids[plan.slots], chosen)
    assert (np.diff(plan.expert_ids) >= 0).all()
    assert plan.assignments.size <= tokens * k + experts * block_size(tokens * k, experts)


@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_a_mixture_and_its_gradients_are_those_of_a_loop(tokens: int, k: int, experts: int) -> None:
    chosen, weights = routed(tokens, k, experts)
    generator = np.random.default_rng(1)
    x, kernels = generator.normal(size=(tokens, 6)), generator.normal(size=(experts, 6, 4))

    def by_blocks(x: jax.Array, kernels: jax.Array, weights: jax.Array) -> jax.Array:
        plan = dispatch_plan(jnp.asarray(chosen), experts)
        y = collect(
            grouped(dispatch(x, plan, None), kernels, plan.expert_ids, "highest", None), plan, None
        )
        return jnp.sum(jnp.sin(jnp.sum(y * weights[:, :, None], axis=1)))

    def by_loop(x: jax.Array, kernels: jax.Array, weights: jax.Array) -> jax.Array:
        y = jnp.einsum("tn,tknm->tkm", x, kernels[chosen], precision="highest")
        return jnp.sum(jnp.sin(jnp.sum(y * weights[:, :, None], axis=1)))

    arguments = jnp.asarray(x), jnp.asarray(kernels), jnp.asarray(weights, jnp.float64)
    found, expected = (
        jax.value_and_grad(one, argnums=(0, 1, 2))(*arguments) for one in (by_blocks, by_loop)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected
    )


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 2), (4, 1)])
def test_gram_matrices_of_experts_are_those_of_their_tokens(first: int, count: int) -> None:
    chosen, weights = routed(90, 2, 5)
    x = np.random.default_rng(1).normal(size=(90, 7)).astype(np.float32)
    plan = dispatch_plan(jnp.asarray(chosen), 5)
    capture = Routed(dispatch(jnp.asarray(x), plan, None), plan, jnp.asarray(weights))
    group = plan.expert_ids - jnp.int32(first)
    group = jnp.where(group < count, group, jnp.int32(-1))
    zeros = jnp.zeros((count, 7, 7), jnp.float32)
    found = jax.jit(gram.add_grouped)(zeros, capture.x, capture.weights(), group)
    for expert in range(first, first + count):
        squared = np.where(chosen == expert, weights, 0).sum(axis=1) ** 2
        expected = x.T @ (squared[:, None] * x)
        np.testing.assert_allclose(
            gram.symmetric(found[expert - first]), expected, rtol=1e-5, atol=1e-5
        )
