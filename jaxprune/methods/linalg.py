"""Matrix products that keep float32 accuracy on every backend, and the least-squares problem that
methods share."""

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
    """Returns how matrices of a dtype are multiplied without the TF32 (GPU) or bfloat16 (TPU)
    rounding of JAX's default precision."""
    return hardware.current().float32_products if dtype == jnp.float32 else lax.Precision.HIGHEST


def matmul(a: Float[Array, "*_ n k"], b: Float[Array, "*_ k m"]) -> Float[Array, "*_ n m"]:
    """Returns a @ b with the accuracy of its dtype; see `exact_products`."""
    return jnp.matmul(a, b, precision=exact_products(a.dtype))


def quadratic(gram: Float[Array, "n n"], kernel: Float[Array, "n m"]) -> Float[Array, ""]:
    """Returns tr(kernelᵀ · gram · kernel), which is ‖X·kernel‖²_F where gram = XᵀX."""
    # Not vdot: it flattens its operands, which gathers kernels that are split over devices, and
    # runs on one core.
    return jnp.sum(kernel * matmul(gram, kernel))


def masked(mask: Bool[Array, "*shape"], values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns mask ∘ values, with zeros where the mask is False whatever the value."""
    return jnp.where(mask, values, jnp.zeros_like(values))


def add_ridge(gram: Float[Array, "n n"], damping: Scalar) -> Float[Array, "n n"]:
    """Returns H + damping · mean(diag H) · I."""
    ridge = jnp.asarray(damping, gram.dtype) * jnp.mean(jnp.diagonal(gram))
    return gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)


class Scaled(NamedTuple):
    """A Gram matrix in the coordinates D·W, in which every input has the same norm.

    Attributes:
        scale: d_j = √H_jj + 1e-8, the diagonal of D; a dead input's is 1e-8.
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
    """Returns the inverse of a symmetric positive definite matrix, A⁻¹ = L⁻ᵀL⁻¹ with L⁻¹ by halves.

    These are 2n³ FLOPs, nearly all in products. Inverting the quarters themselves would take
    4/3·n³, but there the errors of one quarter grow with the condition of the next: at a condition
    of 200 float32 was left with three digits.

    What is not halved any more is factorized as suits the hardware that the program is compiled
    for. A CPU calls no LAPACK: where other work runs on the machine, OpenBLAS's threads wait for
    each other a hundred times longer than they work. A GPU's cuSOLVER takes a quarter of the
    matrix, so that the program is small. A TPU, whose Cholesky factorization is one of 128 × 128,
    takes an eighth, by blocks in a loop.

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
    """Returns the inverse of a symmetric positive definite matrix; see `inverse`.

    Args:
        matrix: the matrix to be inverted.
        leaf: the size that is not halved.
        factor: returns L⁻¹ of A = LLᵀ for a matrix of that size.
    """
    return _gram_of_triangle(_inverse_factor(matrix, leaf, factor), leaf)


def _inverse_factor(matrix: Float[Array, "n n"], leaf: int, factor: Factor) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ.

    With A, B, C the quarters of the matrix, P = L⁻¹ of A and K = BᵀPᵀ, the lower right quarter is Q
    = L⁻¹ of C − KKᵀ, and the lower left one −QKP.
    """
    n = len(matrix)
    if n <= leaf:
        return factor(matrix)
    half = n // 2
    # Each quarter is overwritten as soon as it is not needed any more.
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
    """Returns TᵀT of a lower triangular T, by halves."""
    n, half = len(factor), len(factor) // 2
    if n <= leaf:
        return matmul(factor.T, factor)
    corner = matmul(factor[half:, :half].T, factor[half:, half:])
    added = matmul(factor[half:, :half].T, factor[half:, :half])
    factor = factor.at[half:, :half].set(corner.T).at[:half, half:].set(corner)
    factor = factor.at[half:, half:].set(_gram_of_triangle(factor[half:, half:], leaf))
    return factor.at[:half, :half].set(_gram_of_triangle(factor[:half, :half], leaf) + added)


def solve_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by the factorization and the triangular solve of the backend's
    library."""
    return solve_triangular(
        jnp.linalg.cholesky(matrix), jnp.eye(len(matrix), dtype=matrix.dtype), lower=True
    )


def eliminate_blocks(matrix: Float[Array, "n n"], block: int = 128) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by elimination of so many rows at a time in a loop, all in products
    of fixed shapes.

    As in `eliminate` the identity beside the matrix becomes L⁻¹; here it takes the place of the
    columns that are eliminated. The program is the same whatever n is, for n·n·block FLOPs twice a
    step, 2n³ in all.
    """
    n, size = len(matrix), -(-len(matrix) // block) * block
    rest = jnp.arange(size, dtype=jnp.int32) >= n  # padded by an identity
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
    """Where conjugate gradients ended.

    Attributes:
        weight: [n, m], zero outside the mask.
        steps: taken.
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

    Every column is a problem of its own, with step lengths of its own; all are advanced by the same
    product of n·n by n·m. Preconditioned by diag G. A column that has reached the tolerance rests.
    G may be singular: the problem is always consistent, so a minimum is reached, though not a
    unique one.

    Args:
        gram: G, symmetric and positive semidefinite.
        dense: W₀.
        start: W to begin from; zero outside the mask.
        mask: True = kept.
        steps: the most steps.
        tolerance: the tolerance of the relative residual at which a column is done; 0: all steps
            are taken.

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
