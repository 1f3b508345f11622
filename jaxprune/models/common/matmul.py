"""Products of activations, and their gradients by products of the same kind.

JAX's own gradients of a product whose sums are float32 multiply float32 cotangents with 16-bit
operands, which no matrix unit takes. Here cotangents are rounded as activations are; gradients of
kernels keep their kernel's dtype.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from jaxprune import hardware


def product(equation: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """Returns the product of two arrays, multiplied in the dtype of the first; its vjp keeps both
    as they are.

    Args:
        equation: as `jnp.einsum` has it; every index is in two of the three arrays at least.
        a: activations.
        b: in any dtype.
        dtype: of the result; None: that of `a`.
    """
    # Gradients are traced where the context of the forward pass is over.
    return _product(equation, jax.config.jax_default_matmul_precision, dtype or a.dtype, a, b)


def times_kernel(
    x: Float[Array, "*b n"], kernel: Float[Array, "n m"], *unused: Any, **also_unused: Any
) -> Float[Array, "*b m"]:
    """Returns x @ kernel in the dtype of x, with the signature of `lax.dot_general` for a
    `nnx.Linear`."""
    rows = "abcdefgh"[: x.ndim - 1]
    return product(f"{rows}n,nm->{rows}m", x, kernel)


def times_embedding(
    x: Float[Array, "*b d"], embedding: Float[Array, "v d"]
) -> Float[Array, "*b v"]:
    """Returns x @ embeddingᵀ in the dtype of x: the logits of a model whose head is its
    embedding."""
    rows = "abcefgh"[: x.ndim - 1]
    return product(f"{rows}d,vd->{rows}v", x, embedding)


def all_but_kernels(arrays: Sequence[Array | None], dtype: DTypeLike) -> tuple[Array | None, ...]:
    """Casts inputs and biases of an `nnx.Linear`, whose kernels `times_kernel` takes as they are
    stored."""
    x, kernel, bias = arrays
    assert x is not None
    return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation: str, precision: Any, dtype: DTypeLike, a: Array, b: Array) -> Array:
    b = b.astype(a.dtype)
    if a.dtype.itemsize == 2 and hardware.current().float32_results:
        equation, a, b = _as_cpus_multiply(equation, a, b)
        return jnp.einsum(
            equation, a, b, precision=precision, preferred_element_type=jnp.float32
        ).astype(dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


def _as_cpus_multiply(equation: str, a: Array, b: Array) -> tuple[str, Array, Array]:
    """Writes a product of 16-bit arrays as XLA's CPU backend has it in 16 bits, several times as
    fast: results in float32, and the sum over the last index of the operand whose rows are the
    result's."""
    operands, result = equation.split("->")
    first, second = operands.split(",")
    if min(map(result.index, set(result) - set(first))) < min(
        map(result.index, set(result) - set(second))
    ):
        a, b, first, second = b, a, second, first
    last = "".join(sorted(first, key=lambda index: (index not in result, first.index(index))))
    if last != first:
        # else it would be part of the product again
        a = lax.optimization_barrier(a.transpose(*map(first.index, last)))
    return f"{last},{second}->{result}", a, b


def _forward(
    equation: str, precision: Any, dtype: DTypeLike, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _product(equation, precision, dtype, a, b), (a, b)


def _backward(
    equation: str, precision: Any, dtype: DTypeLike, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    (a, b), cotangent = kept, cotangent.astype(kept[0].dtype)
    operands, result = equation.split("->")
    first, second = operands.split(",")
    of_a, of_b = f"{result},{second}->{first}", f"{first},{result}->{second}"
    return _product(of_a, precision, a.dtype, cotangent, b), _product(
        of_b, precision, b.dtype, a, cotangent
    )


_product.defvjp(_forward, _backward)
