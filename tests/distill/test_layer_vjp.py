"""A layer's backward pass is that of `jax.vjp`, which holds no kernel between the passes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.distill import adafactor
from jaxprune.distill.layer_vjp import forward_and_vjp, pull_back
from jaxprune.errors import UserError
from jaxprune.models import Layer, architecture_of
from tests.helpers import families


def example(
    folder: Path, family: str, shape: tuple[int, int], dtype: Any
) -> tuple[Layer, dict, dict, jax.Array]:
    """Returns a family's last layer, its kernels, its other params, and inputs."""
    families.config(family, next(iter(families.VARIANTS[family]))).save_pretrained(folder)
    architecture = architecture_of(folder, dtype)
    layer, generator = architecture.layers[-1], np.random.default_rng(0)
    rest = {
        path: jnp.asarray(0.3 * generator.standard_normal(s.shape), s.dtype)
        for path, s in layer.spec.items()
    }
    kernels = {
        name: rest.pop(name).astype(dtype)
        for name in adafactor.shapes(layer, np.dtype(dtype)).values
    }
    return (
        layer,
        kernels,
        rest,
        jnp.asarray(generator.standard_normal((*shape, architecture.width)), dtype),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_next"])
def test_gradients_are_those_of_jax_vjp_and_no_kernel_is_saved(
    family: str, dtype: Any, tmp_path: Path
) -> None:
    layer, kernels, rest, x = example(tmp_path, family, (2, 8), dtype)
    forward = jax.jit(
        lambda kernels, rest, x: jax.vjp(lambda k, x: layer({**rest, **k}, x)[0], kernels, x)
    )
    plain_output, plain_vjp = forward(kernels, rest, x)
    output, vjp = forward_and_vjp(layer, kernels, rest, x)
    cotangent = jnp.flip(x)
    found = output, *pull_back(layer, kernels, rest, vjp, cotangent)
    expected = plain_output, *jax.jit(lambda vjp, cotangent: vjp(cotangent))(plain_vjp, cotangent)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    def copies(vjp: Any) -> set[str]:
        """Returns the kernels whose numbers are a saved value, in whatever order and dtype."""
        saved = [np.sort(np.asarray(leaf, np.float32), None) for leaf in jax.tree.leaves(vjp)]
        numbers = {
            name: np.sort(np.asarray(kernel, np.float32), None) for name, kernel in kernels.items()
        }
        return {
            name
            for name, own in numbers.items()
            if any(np.array_equal(own, other) for other in saved)
        }

    assert copies(plain_vjp) == kernels.keys() and copies(vjp) == set()
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in (plain_vjp, kernels, vjp)]
    assert sizes[0] == sizes[1] + sizes[2]


def _ignores_saveable_args(
    function: Callable[..., Any], *args: Any, saveable_args: Any = True
) -> Any:
    return REAL(function, *args)


def _has_no_args_res(function: Callable[..., Any], *args: Any, saveable_args: Any = True) -> Any:
    return function(*args), lambda cotangent: cotangent


def _has_neither(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args), lambda cotangent: cotangent


def _has_a_tuple(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args), SimpleNamespace(args_res=(None, None))


REAL = jax.vjp


@pytest.mark.parametrize(
    "other", [_ignores_saveable_args, _has_no_args_res, _has_neither, _has_a_tuple]
)
def test_another_interface_of_jax_vjp_is_one_line(
    other: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, kernels, rest, x = example(tmp_path, "llama", (3, 7), jnp.float32)
    monkeypatch.setattr(jax, "vjp", other)
    with pytest.raises(UserError) as raised:
        jax.eval_shape(lambda *args: forward_and_vjp(layer, *args), kernels, rest, x)
    assert f"JAX {jax.__version__} " in str(raised.value) and "\n" not in str(raised.value)
