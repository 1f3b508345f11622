"""Matrix products with float32 accuracy on every backend, and the linear algebra that methods
share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxprune import hardware

Scalar = float | Float[Array, ""]


def exact_products(dtype: DTypeLike) -> lax.Precision | lax.DotAlgorithmPreset:
    """Returns the precision for products of a dtype without JAX's default rounding to TF32 (GPU) or
    bfloat16 (TPU)."""
    return hardware.current().float32_products if dtype == jnp.float32 else lax.Precision.HIGHEST


def matmul(a: Float[Array, "*_ n k"], b: Float[Array, "*_ k m"]) -> Float[Array, "*_ n m"]:
    """Returns a @ b with the accuracy of its dtype; see `exact_products`."""
    return jnp.matmul(a, b, precision=exact_products(a.dtype))


def quadratic(gram: Float[Array, "n n"], kernel: Float[Array, "n m"]) -> Float[Array, ""]:
    """Returns tr(kernelᵀ · gram · kernel), which is ‖X·kernel‖²_F if gram = XᵀX."""
    # jnp.vdot flattens its operands, which gathers sharded kernels, and runs on one core.
    return jnp.sum(kernel * matmul(gram, kernel))


def masked(mask: Bool[Array, "*shape"], values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns mask ∘ values, with zeros where the mask is False even if the value is not finite."""
    return jnp.where(mask, values, jnp.zeros_like(values))


def add_ridge(gram: Float[Array, "n n"], damping: Scalar) -> Float[Array, "n n"]:
    """Returns H + damping · mean(diag H) · I."""
    ridge = jnp.asarray(damping, gram.dtype) * jnp.mean(jnp.diagonal(gram))
    return gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)


class Scaled(NamedTuple):
    """A Gram matrix in the coordinates D·W, in which all inputs have the same norm.

    Attributes:
        scale: d_j = √H_jj + 1e-8, the diagonal of D; 1e-8 for a dead input.
        gram: G = D⁻¹HD⁻¹ + ridge.
    """

    scale: Float[Array, "n"]
    gram: Float[Array, "n n"]


@jax.jit
def precondition(gram: Float[Array, "n n"], damping: Scalar) -> Scaled:
    """Scales a Gram matrix to a diagonal of ones (zeros for dead inputs), then adds a ridge."""
    scale = jnp.sqrt(jnp.diagonal(gram)) + jnp.asarray(1e-8, gram.dtype)
    return Scaled(scale, add_ridge(gram / (scale[:, None] * scale[None, :]), damping))


Factor = Callable[[Float[Array, "n n"]], Float[Array, "n n"]]


def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the inverse of a symmetric positive definite matrix, A⁻¹ = L⁻ᵀL⁻¹.

    A recursion on halves computes L⁻¹. In total this takes 2n³ FLOPs, nearly all in matrix
    products. Inverting the quarters themselves would take 4/3·n³ FLOPs, but the errors of one
    quarter then grow with the condition number of the next. At a condition number of 200, float32
    was left with three digits.

    The factorization of the leaves of the recursion depends on the hardware:

    - A CPU eliminates row by row and calls no LAPACK. If other work runs on the machine, OpenBLAS's
      threads wait for each other a hundred times longer than they compute.
    - A GPU calls cuSOLVER for quarters of the matrix, which keeps the program small.
    - A TPU eliminates eighths of the matrix by blocks in a loop. Its Cholesky factorization is one
      of 128 × 128.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 13.2 and 14.3.
    """
    n = len(matrix)
    if hardware.current().on_cpu:
        return by_halves(matrix, leaf=max(128, -(-n // 64)), factor=eliminate)
    if hardware.current().platform == "tpu":
        return by_halves(matrix, leaf=max(512, -(-n // 8)), factor=eliminate_blocks)
    return by_halves(matrix, leaf=max(1024, -(-n // 4)), factor=solve_cholesky)


def by_halves(matrix: Float[Array, "n n"], leaf: int, factor: Factor) -> Float[Array, "n n"]:
    """Returns the inverse of a symmetric positive definite matrix by recursion; see `inverse`.

    Args:
        matrix: [n, n].
        leaf: the largest size that is not halved.
        factor: returns L⁻¹ of A = LLᵀ for a matrix of at most that size.
    """
    return _gram_of_triangle(_inverse_factor(matrix, leaf, factor), leaf)


def _inverse_factor(matrix: Float[Array, "n n"], leaf: int, factor: Factor) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ.

    Let A, B and C be the upper left, upper right and lower right quarters of the matrix, P = L⁻¹ of
    A, and K = BᵀPᵀ. The lower right quarter of the result is Q = L⁻¹ of C − KKᵀ, and the lower left
    one is −QKP.
    """
    n = len(matrix)
    if n <= leaf:
        return factor(matrix)
    half = n // 2
    # Overwriting each quarter after its last use saves memory.
    matrix = matrix.at[:half, :half].set(_inverse_factor(matrix[:half, :half], leaf, factor))
    k = matmul(matrix[half:, :half], matrix[:half, :half].T)
    q = _inverse_factor(matrix[half:, half:] - matmul(k, k.T), leaf, factor)
    matrix = (
        matrix.at[half:, half:]
        .set(q)
        .at[half:, :half]
        .set(-matmul(q, matmul(k, matrix[:half, :half])))
    )
    return matrix.at[:half, half:].set(0)


def _gram_of_triangle(factor: Float[Array, "n n"], leaf: int) -> Float[Array, "n n"]:
    """Returns TᵀT of a lower triangular T, by recursion on halves."""
    n, half = len(factor), len(factor) // 2
    if n <= leaf:
        return matmul(factor.T, factor)
    corner = matmul(factor[half:, :half].T, factor[half:, half:])
    added = matmul(factor[half:, :half].T, factor[half:, :half])
    factor = factor.at[half:, :half].set(corner.T).at[:half, half:].set(corner)
    factor = factor.at[half:, half:].set(_gram_of_triangle(factor[half:, half:], leaf))
    return factor.at[:half, :half].set(_gram_of_triangle(factor[:half, :half], leaf) + added)


def solve_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by the backend's Cholesky factorization and triangular solve."""
    return solve_triangular(
        jnp.linalg.cholesky(matrix), jnp.eye(len(matrix), dtype=matrix.dtype), lower=True
    )


def eliminate_blocks(matrix: Float[Array, "n n"], block: int = 128) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by elimination of `block` rows at a time in a loop.

    As in `eliminate`, an identity beside the matrix becomes L⁻¹; here it takes the place of the
    eliminated columns. All products have fixed shapes, so the size of the program does not depend
    on n. A step takes 2·n²·block FLOPs, 2n³ in all.
    """
    n, size = len(matrix), -(-len(matrix) // block) * block
    rest = jnp.arange(size, dtype=jnp.int32) >= n  # pad with an identity
    padded = jnp.pad(matrix, (0, size - n)) + jnp.diag(rest.astype(matrix.dtype))
    place = jnp.arange(size, dtype=jnp.int32)

    def step(i: int | Array, state: Array) -> Array:
        start = jnp.int32(i) * block
        rows = lax.dynamic_slice_in_dim(state, start, block, axis=0)
        columns = lax.dynamic_slice_in_dim(state, start, block, axis=1)
        own = solve_cholesky(lax.dynamic_slice_in_dim(rows, start, block, axis=1))
        below = (place >= start + block)[:, None]
        factors = masked(jnp.broadcast_to(below, columns.shape), matmul(columns, own.T))
        inside = (place >= start) & (place < start + block)
        rows = lax.dynamic_update_slice_in_dim(matmul(own, rows), own, start, axis=1)
        state = masked(~(below & inside[None, :]), state) - matmul(factors, rows)
        return lax.dynamic_update_slice_in_dim(state, rows, start, axis=0)

    return jnp.tril(lax.fori_loop(0, size // block, step, padded)[:n, :n])


def eliminate(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by elimination; a positive definite matrix needs no pivoting."""
    n = len(matrix)

    def step(i: int | Array, state: Array) -> Array:
        row = state[i] / jnp.sqrt(state[i, i])
        factors = jnp.where(
            jnp.arange(n) > i, state[:, i] / jnp.sqrt(state[i, i]), jnp.zeros((), state.dtype)
        )
        return (state - factors[:, None] * row[None, :]).at[i].set(row)

    return lax.fori_loop(
        0, n, step, jnp.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)], axis=1)
    )[:, n:]


class Minimum(NamedTuple):
    """The result of conjugate gradients.

    Attributes:
        weight: [n, m], zero outside the mask.
        steps: the number of steps taken.
        residual: the largest ‖M ∘ G(W₀ − W)‖₂ / ‖M ∘ GW₀‖₂ of a column.
    """

    weight: Float[Array, "n m"]
    steps: Int[Array, ""]
    residual: Float[Array, ""]


def conjugate_gradients(
    gram: Float[Array, "n n"],
    dense: Float[Array, "n m"],
    start: Float[Array, "n m"],
    mask: Bool[Array, "n m"],
    steps: int | Int[Array, ""],
    tolerance: Scalar,
) -> Minimum:
    """Minimises tr((W₀ − W)ᵀ G (W₀ − W)) over all W that are zero outside the mask.

    Each column is an independent problem with its own step lengths; one product of n·n by n·m
    advances all of them. The preconditioner is diag G. A column that has reached the tolerance no
    longer changes. G may be singular: the problem is always consistent, so the steps reach a
    minimum, though not a unique one.

    Args:
        gram: G, [n, n], symmetric and positive semidefinite.
        dense: W₀, [n, m].
        start: [n, m], the initial W; zero outside the mask.
        mask: [n, m], True = kept.
        steps: the maximum number of steps.
        tolerance: the relative residual at which a column is done; 0 takes all steps.

    References:
        Saad, "Iterative Methods for Sparse Linear Systems", 2003, algorithm 9.1.
    """
    diagonal = jnp.diagonal(gram)[:, None]
    inverse = jnp.where(diagonal > 0, 1 / diagonal, jnp.zeros_like(diagonal))
    dtype, zero = gram.dtype, jnp.zeros((), gram.dtype)

    def dots(a: Float[Array, "n m"], b: Float[Array, "n m"]) -> Float[Array, "m"]:
        return jnp.sum(a * b, axis=0)

    def divide(a: Float[Array, "m"], b: Float[Array, "m"]) -> Float[Array, "m"]:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, jnp.ones_like(b)), zero)

    residual = masked(mask, matmul(gram, dense - start))
    wanted = jnp.linalg.norm(masked(mask, matmul(gram, dense)), axis=0)
    limit = jnp.asarray(tolerance, dtype) * wanted
    direction = inverse * residual
    state = jnp.zeros((), jnp.int32), start, residual, direction, dots(residual, direction)

    def unfinished(state: tuple[Array, Array, Array, Array, Array]) -> Bool[Array, ""]:
        step, _, residual, *_ = state
        return (step < steps) & jnp.any(jnp.linalg.norm(residual, axis=0) > limit)

    def advance(
        state: tuple[Array, Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array, Array]:
        step, weight, residual, direction, energy = state
        image = masked(mask, matmul(gram, direction))
        active = jnp.linalg.norm(residual, axis=0) > limit
        length = jnp.where(active, divide(energy, dots(direction, image)), zero)[None, :]
        weight = weight + length * direction
        residual = residual - length * image
        correction = inverse * residual
        after = dots(residual, correction)
        direction = correction + divide(after, energy)[None, :] * direction
        return step + jnp.ones_like(step), weight, residual, direction, after

    step, weight, residual, *_ = lax.while_loop(unfinished, advance, state)
    relative = divide(jnp.linalg.norm(residual, axis=0), wanted)
    return Minimum(weight, step, jnp.max(relative))
