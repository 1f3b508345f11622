"""Splits a layer's `jax.vjp` into a forward and a backward pass that run separately."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxprune.errors import UserError
from jaxprune.models import Part

TESTED = "0.10 to 0.12"
"""Versions of JAX whose VJP objects are known to work."""


@partial(jax.jit, static_argnums=0)
def forward_and_vjp(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], Any]:
    """Computes a layer's output and its vjp function.

    The vjp function does not hold the kernels: `pull_back` adds them again.

    Raises:
        UserError: the installed version of JAX cannot leave them out.
    """
    return _vjp_without_kernels(lambda values, x: part({**rest, **values}, x)[0], dict(values), x)


def _vjp_without_kernels(
    function: Callable[[Any, Any], Any], kernels: dict[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], Any]:
    """Returns the function's output and its `jax.vjp`, without the kernels in `args_res`.

    JAX 0.11 added `saveable_args` and documented `args_res`:
    https://docs.jax.dev/en/latest/301/vjp-objects.html. JAX 0.10 has the same `args_res`,
    undocumented.
    """
    documented = "saveable_args" in inspect.signature(jax.vjp).parameters
    saveable: dict[str, Any] = {"saveable_args": (False, True)} if documented else {}
    vjp: Any
    output, vjp = jax.vjp(function, kernels, x, **saveable)
    if not documented and _has_args_res(vjp):
        vjp.args_res[0] = None
    own = {id(kernel) for kernel in kernels.values()}
    if not _has_args_res(vjp) or any(id(leaf) in own for leaf in jax.tree.leaves(vjp)):
        raise UserError(
            f"the jax.vjp of JAX {jax.__version__} saves kernels, but distillation needs one that "
            f"leaves them out: install JAX {TESTED}"
        )
    return output, vjp


def _has_args_res(vjp: Any) -> bool:
    """Returns whether a VJP object holds the saved values of both arguments in a list."""
    saved = getattr(vjp, "args_res", None)
    return isinstance(saved, list) and len(saved) == 2


@partial(jax.jit, static_argnums=0)
def pull_back(
    part: Part,
    values: Mapping[str, Array],
    rest: Mapping[str, Array],
    vjp: Any,
    cotangent: Float[Array, "b t d"],
) -> tuple[dict[str, Array], Float[Array, "b t d"]]:
    """Computes gradients of a layer's kernels, in the dtype of the computation, and of its input.

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
