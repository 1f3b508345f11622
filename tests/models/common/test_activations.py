"""Activations and what they gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import DTypeLike

from jaxprune.models.common.activations import ACTIVATIONS, gated


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_product_is_rounded_once_and_its_gradient_keeps_two_arrays(
    activation: str, dtype: DTypeLike
) -> None:
    generator = np.random.default_rng(0)
    gate, up, cotangent = (jnp.asarray(generator.normal(size=(8, 24)), dtype) for _ in range(3))
    found, vjp = jax.vjp(lambda *both: gated(activation, *both), gate, up)
    exact, exact_vjp = jax.vjp(
        lambda a, b: ACTIVATIONS[activation](a) * b,
        gate.astype(jnp.float64),
        up.astype(jnp.float64),
    )
    tolerance = {"rtol": 2 * float(jnp.finfo(dtype).eps), "atol": 2 * float(jnp.finfo(dtype).eps)}
    np.testing.assert_allclose(found.astype(jnp.float64), exact, **tolerance)
    for one, other in zip(vjp(cotangent), exact_vjp(cotangent.astype(jnp.float64)), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float64), other, **tolerance)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) == gate.nbytes + up.nbytes
