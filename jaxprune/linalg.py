"""Matrix products that keep float32 accuracy on every backend."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

matmul = functools.partial(jnp.matmul, precision="highest")
"""`a @ b` without the TF32 (GPU) or bfloat16 (TPU) rounding of JAX's default precision."""


def quadratic(gram: Float[Array, "n n"], kernel: Float[Array, "n m"]) -> Float[Array, ""]:
    """tr(kernelᵀ · gram · kernel), which is ‖X·kernel‖²_F where gram = XᵀX."""
    return jnp.vdot(kernel, matmul(gram, kernel), precision="highest")
