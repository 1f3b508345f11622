"""Products of activations and their gradients, against float64's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.hardware import Hardware, writing_for
from jaxprune.models.common.matmul import product

SIZES = {"a": 2, "b": 3, "d": 8, "k": 2, "m": 5, "n": 7, "q": 6, "s": 4, "v": 9}
EQUATIONS = ["abn,nm->abm", "abd,vd->abv", "bkqd,bksd->bkqs", "bkqs,bksd->bkqd", "nm,bn->bm"]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_16_bit_products_and_their_gradients(equation: str, platform: str) -> None:
    """Whole numbers, so that every sum is exact in bfloat16 and in another order."""
    first, second, result = equation.replace("->", ",").split(",")
    generator = np.random.default_rng(0)
    a, b, cotangent = (
        generator.integers(-2, 3, [SIZES[i] for i in part]) for part in (first, second, result)
    )
    with writing_for(Hardware(platform)):
        found, vjp = jax.vjp(
            lambda a, b: product(equation, a, b), *(jnp.asarray(x, jnp.bfloat16) for x in (a, b))
        )
        gradients = vjp(jnp.asarray(cotangent, jnp.bfloat16))
    assert {x.dtype for x in (found, *gradients)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(found, np.einsum(equation, a, b))
    np.testing.assert_array_equal(
        gradients[0], np.einsum(f"{result},{second}->{first}", cotangent, b)
    )
    np.testing.assert_array_equal(
        gradients[1], np.einsum(f"{first},{result}->{second}", a, cotangent)
    )
