"""Matrix products that keep float32 accuracy on every backend, and the least-squares problem that methods share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]

matmul = functools.partial(jnp.matmul, precision="highest")
"""`a @ b` without the TF32 (GPU) or bfloat16 (TPU) rounding of JAX's default precision."""


def quadratic(gram: Float[Array, "n n"], kernel: Float[Array, "n m"]) -> Float[Array, ""]:
    """Returns tr(kernelᵀ · gram · kernel), which is ‖X·kernel‖²_F where gram = XᵀX."""
    # Not vdot: it flattens its operands, which gathers kernels that are split over devices, and runs on one core.
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


def inverse(matrix: Float[Array, "n n"], leaf: int | None = None) -> Float[Array, "n n"]:
    """Returns the inverse of a symmetric positive definite matrix, A⁻¹ = L⁻ᵀL⁻¹ with L⁻¹ by halves.

    These are 2n³ FLOPs, nearly all in products. On CPU it calls no LAPACK: where other work runs on the machine,
    OpenBLAS's threads wait for each other a hundred times longer than they work. Inverting the quarters themselves
    would take 4/3·n³, but there the errors of one quarter grow with the condition of the next: at a condition of 200
    float32 was left with three digits.

    Args:
        matrix: the matrix to be inverted.
        leaf: the size that is not halved; None: what suits backend and matrix.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 13.2 and 14.3.
    """
    cpu = jax.default_backend() == "cpu"
    leaf = leaf or max(128 if cpu else 1024, -(-len(matrix) // 64))
    return _gram_of_triangle(_inverse_factor(matrix, leaf), leaf)


def _inverse_factor(matrix: Float[Array, "n n"], leaf: int) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ.

    With A, B, C the quarters of the matrix, P = L⁻¹ of A and K = BᵀPᵀ, the lower right quarter is Q = L⁻¹ of C − KKᵀ,
    and the lower left one −QKP.
    """
    n = len(matrix)
    if n <= leaf:
        if jax.default_backend() == "cpu":
            return _eliminate(matrix)
        return solve_triangular(jnp.linalg.cholesky(matrix), jnp.eye(n, dtype=matrix.dtype), lower=True)
    half = n // 2
    # Each quarter is overwritten as soon as it is not needed any more.
    matrix = matrix.at[:half, :half].set(_inverse_factor(matrix[:half, :half], leaf))
    k = matmul(matrix[half:, :half], matrix[:half, :half].T)
    q = _inverse_factor(matrix[half:, half:] - matmul(k, k.T), leaf)
    matrix = matrix.at[half:, half:].set(q).at[half:, :half].set(-matmul(q, matmul(k, matrix[:half, :half])))
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


def _eliminate(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns L⁻¹ of A = LLᵀ, by elimination; a positive definite matrix needs no pivoting."""
    n = len(matrix)

    def step(i: int | Array, state: Array) -> Array:
        row = state[i] / jnp.sqrt(state[i, i])
        factors = jnp.where(jnp.arange(n) > i, state[:, i] / jnp.sqrt(state[i, i]), jnp.zeros((), state.dtype))
        return (state - factors[:, None] * row[None, :]).at[i].set(row)

    return lax.fori_loop(0, n, step, jnp.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)], axis=1))[:, n:]


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

    Every column is a problem of its own, with step lengths of its own; all are advanced by the same product of
    n·n by n·m. Preconditioned by diag G. A column that has reached the tolerance rests. G may be singular: the
    problem is always consistent, so a minimum is reached, though not a unique one.

    Args:
        gram: G, symmetric and positive semidefinite.
        dense: W₀.
        start: W to begin from; zero outside the mask.
        mask: True = kept.
        steps: the most steps.
        tolerance: the tolerance of the relative residual at which a column is done; 0: all steps are taken.

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

    def advance(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
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
