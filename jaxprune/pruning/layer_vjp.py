"""A layer's backward pass, apart from its forward pass."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxprune.models import Part


@partial(jax.jit, static_argnums=0)
def forward_and_vjp(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], Any]:
    """Computes a layer's output, and the function from its cotangent to those of the kernels and of the input.

    The kernels themselves are left out of what that function keeps: `pull_back` puts them in again.
    """
    output, vjp = jax.vjp(lambda values, x: part({**rest, **values}, x)[0], dict(values), x)
    vjp.args_res[0] = None
    return output, vjp


@partial(jax.jit, static_argnums=0)
def pull_back(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], vjp: Any, cotangent: Float[Array, "b t d"]
) -> tuple[dict[str, Array], Float[Array, "b t d"]]:
    """Computes the gradients of a layer's kernels, in the dtype of the computation, and the cotangent of its input.

    Args:
        part: the layer.
        values: its kernels.
        rest: its other params.
        vjp: the vjp from `forward_and_vjp`, or the layer's input.
        cotangent: the cotangent of the layer's output.
    """
    backward = vjp if callable(vjp) else forward_and_vjp(part, values, rest, vjp)[1]
    backward.args_res[0] = dict(values)
    gradients, before = backward(cotangent)
    return {name: gradient.astype(cotangent.dtype) for name, gradient in gradients.items()}, before
