"""The FLOPs of a program: those of its matrix products and factorizations, counted in the program
itself, without running it."""

import functools
import math
from collections import Counter
from itertools import chain
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.lax import DotAlgorithmPreset

Flops = Counter[str]
"""Kind of products -> floating-point operations: the dtype of the operands, for each runs at a rate
of its own, or `BF16X6`."""
BF16X6 = "bf16x6"
"""Products of float32 by six of bfloat16 parts."""
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""JAX's names of cuDNN's attention -> products for each pair of tokens."""


@functools.lru_cache(4096)  # JAX traces a function once for the same shapes: programs share parts
def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Counts the FLOPs of the products and factorizations that a program's results need.

    A product of n·k by k·m is 2nkm; a Cholesky factorization n³/3; a triangular solve n²m;
    eigenvectors about 9n³. A loop whose number of iterations depends on the data counts as one
    iteration. cuDNN's causal attention counts the pairs of tokens that see each other: two products
    of each, five for its gradient.

    Args:
        jaxpr: the program.

    Returns:
        The count, which is not to be changed: it is that of the next call, too.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    total = Flops()
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            total.update(_flops_of(equation))
    return total


def _flops_of(equation: JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    inner = [count_flops(program) for program in inner_programs(equation)]
    if inner:
        if name == "cond":
            return max(inner, key=lambda flops: sum(flops.values()))
        times = params["length"] if name == "scan" else 1
        return Flops(
            {dtype: times * sum(flops[dtype] for flops in inner) for dtype in set().union(*inner)}
        )
    if name not in ("dot_general", "cholesky", "triangular_solve", "eigh", *CUDNN):
        return Flops()
    operand: Any = equation.invars[0].aval
    shape, result = operand.shape, equation.outvars[0].aval
    if name in CUDNN:
        b, t, h, d = shape
        window = min(t, params["sliding_window_length"] or t)
        count = 2 * CUDNN[name] * b * h * d * (window * t - window * (window - 1) // 2)
    elif name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        count = 2 * result.size * math.prod(shape[axis] for axis in contracted)
    elif name == "cholesky":
        count = shape[-1] ** 3 // 3
    elif name == "triangular_solve":
        count = shape[-1] * result.size
    else:
        count = 9 * shape[-1] ** 3
    by_parts = params.get("precision") == DotAlgorithmPreset.BF16_BF16_F32_X6
    return Flops({BF16X6 if by_parts else operand.dtype.name: count})


def inner_programs(equation: JaxprEqn) -> list[Jaxpr]:
    """Returns the programs inside an equation, without their constants, which no count needs."""
    values = (value if isinstance(value, tuple) else (value,) for value in equation.params.values())
    every = [one for one in chain.from_iterable(values) if isinstance(one, ClosedJaxpr | Jaxpr)]
    return [one.jaxpr if isinstance(one, ClosedJaxpr) else one for one in every]
