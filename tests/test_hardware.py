"""What programs are written for."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import DotAlgorithmPreset, Precision

from jaxprune.hardware import Hardware, current, writing_for
from jaxprune.methods import linalg


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "8.0", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "9.0", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "10.3", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "8.6", Precision.HIGHEST),
        ("gpu", "8.9", Precision.HIGHEST),
        ("gpu", "12.0", Precision.HIGHEST),
        ("gpu", "gfx942", Precision.HIGHEST),
        ("tpu", None, Precision.HIGHEST),
        ("cpu", None, Precision.HIGHEST),
    ],
)
def test_float32_is_multiplied_by_parts_where_that_is_faster(
    platform: str, capability: str | None, expected: object
) -> None:
    with writing_for(Hardware.of(types.SimpleNamespace(platform=platform, compute_capability=capability))):
        assert linalg.exact_products(jnp.float32) == expected
        assert linalg.exact_products(jnp.float64) == Precision.HIGHEST


def test_programs_are_written_for_this_machine_or_another() -> None:
    seen = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        seen.append(current().platform)
        return x

    here = jax.local_devices()[0].platform
    for hardware in (None, Hardware("tpu"), Hardware("gpu", 9.0), Hardware("tpu")):
        with writing_for(hardware):
            function(jnp.float32(1))
    assert seen == [here, "tpu", "gpu"]  # the last one is there already


def test_six_products_of_parts_are_as_good_as_float32() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 300, 300)).astype(np.float32)

    def parts(x: np.ndarray) -> list[jax.Array]:
        found: list[jax.Array] = []
        for _ in range(3):
            found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - found[-1]
        assert not np.asarray(x).any()  # three parts are all of a float32
        return found

    left, right = parts(a), parts(b)
    pairs = sorted(((i, j) for i in range(3) for j in range(3 - i)), key=sum, reverse=True)
    found = sum((linalg.matmul(left[i], right[j]) for i, j in pairs), jnp.zeros((), jnp.float32))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    errors = [
        np.linalg.norm(np.asarray(value) - exact) for value in (found, linalg.matmul(jnp.asarray(a), jnp.asarray(b)))
    ]
    assert errors[0] < 1.5 * errors[1]
