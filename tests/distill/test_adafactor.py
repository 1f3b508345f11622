"""Steps of Adafactor: their size, and how weights of 16 bits are rounded."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.distill import adafactor


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_steps_of_16_bit_weights_are_right_in_the_mean(dtype: type) -> None:
    """Far smaller than the spacing of the weights, and what is zero stays it."""
    value = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    value[::2] = 0
    kernels = adafactor.init({"a": value}, np.dtype(dtype))
    begin = np.asarray(kernels.moving["a"].value, np.float32)
    rate, gradient = jnp.float32(1e-4), jnp.asarray(np.sign(value), dtype)
    for number in range(1, 1001):
        moving = adafactor.step(kernels, {"a": gradient}, jnp.float32(number), rate)
        kernels = kernels._replace(moving=moving)
    found = np.asarray(kernels.moving["a"].value, np.float32)
    assert (
        kernels.moving["a"].value.dtype == dtype and (found == 0).tolist() == (value == 0).tolist()
    )
    # All gradients have the same size, so a step is the rate in units of the root mean square.
    rms = np.sqrt(np.mean(begin[begin != 0] ** 2))
    np.testing.assert_allclose((begin - found) / rms, 0.1 * np.sign(value), atol=0.01)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_what_needs_no_rounding_is_not_rounded(dtype: type) -> None:
    value = np.asarray(jnp.linspace(-3, 3, 48, dtype=dtype), np.float32).reshape(8, 6)
    kernels = adafactor.init({"a": value}, np.dtype(dtype))
    moving = adafactor.step(
        kernels, {"a": jnp.zeros((8, 6), dtype)}, jnp.float32(7), jnp.float32(1)
    )
    np.testing.assert_array_equal(np.asarray(moving["a"].value, np.float32), value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000])
def test_a_weight_that_is_no_number_stays_none(bits: int, dtype: type) -> None:
    """Whatever the bits of NaN are: on NVIDIA's GPUs they are all set. The last is infinity."""
    value = jnp.full((8, 6), lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32))
    for number in range(1, 9):
        assert not np.isfinite(
            np.asarray(adafactor._dithered(value, np.dtype(dtype), jnp.float32(number)))
        ).any()


def test_no_step_is_much_larger_than_the_rate() -> None:
    """The second expert's last gradient is a hundred times as large as those before it; the third
    is not tuned."""
    generator = np.random.default_rng(0)
    value = generator.standard_normal((3, 8, 6)).astype(np.float32) * (
        generator.random((3, 8, 6)) < 0.5
    )
    kernels = adafactor.init({"a": value.astype(np.float32)}, np.dtype(np.float32), {"a": [0, 1]})
    sizes = []
    for number in range(1, 9):
        gradient = generator.standard_normal(value.shape).astype(np.float32)
        gradient[1] *= 100 if number == 8 else 1
        before = np.asarray(kernels.moving["a"].value).copy()
        step = jnp.float32(number), jnp.float32(0.01)
        kernels = kernels._replace(
            moving=adafactor.step(kernels, {"a": jnp.asarray(gradient)}, *step)
        )
        moved, rms = (
            np.asarray(kernels.moving["a"].value) - before,
            [np.sqrt(np.mean(v[v != 0] ** 2)) for v in value],
        )
        sizes.append(
            [
                np.sqrt(np.mean(m[v != 0] ** 2)) / u / 0.01
                for m, v, u in zip(moved, value, rms, strict=True)
            ]
        )
    assert np.max(sizes) < 1.1 and np.min(np.array(sizes)[:, :2]) > 0.5  # the last would be 3
    assert sizes[-1][1] > 0.9 and np.max(np.array(sizes)[:, 2]) == 0


def test_the_state_does_not_depend_on_where_a_run_was_stopped() -> None:
    """What a reader gives is transposed in memory, what a run store gives is not."""
    kernels = np.random.default_rng(0).standard_normal((20, 300, 200)).astype(np.float32)
    cases = [*((kernel, {}) for kernel in kernels), (kernels, {"kernel": range(20)})]
    for value, experts in cases:
        one, other = (
            adafactor.init({"kernel": array}, np.dtype(np.float32), experts).fixed["kernel"]
            for array in (value, np.ascontiguousarray(value.swapaxes(-1, -2)).swapaxes(-1, -2))
        )
        for field in one._fields:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)
