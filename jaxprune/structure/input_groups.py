r"""Selects the inputs of a linear layer that matter least, and re-optimizes the others exactly.

With the damped Gram matrix H of the inputs, removing the group of inputs g costs

    tr(W_gᵀ ([H⁻¹]_gg)⁻¹ W_g)

if all other weights are updated optimally (optimal brain surgeon). This is an error of the layer's
output. How much the loss depends on the group is known from its gradients: the first-order change
of the loss without the group, squared and summed over tokens, c_g. The same change of the output is
tr(W₀_gᵀ H_gg W₀_g). The cost is multiplied by √(c_g / tr(W₀_gᵀ H_gg W₀_g)), the geometric mean
between a criterion of the output and one of the loss.

Groups are removed in steps. In each step the cheapest ones go together, W is updated, and H⁻¹ is
downdated to that of the inputs that remain. At the end the remaining weights are solved for again
from H, so errors of the steps do not add up: W_K = H_KK⁻¹ H_K· W₀.

References:
    Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS
    1992.
    Ling et al., "SlimGPT: Layer-wise Structured Pruning for Large Language Models", NeurIPS 2024
    (arXiv 2412.18110).
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (arXiv
    1906.10771), for c_g.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.methods.linalg import Scaled, inverse, matmul, precondition, quadratic
from jaxprune.sharding import fetch

DAMPING = 0.2
"""Added to the diagonal of the scaled Gram matrix, as a fraction of its mean."""
STEPS = 64
"""Number of steps in which groups are removed, at most."""
LEAST = 1e-6
"""The least factor of a cost, as a fraction of the mean."""


def remove_inputs(
    gram: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    changes: Float[Array, "groups"],
    keep: int,
) -> tuple[Int[np.ndarray, "k"], Float[Array, "rows m"], float]:
    """Removes groups of consecutive inputs.

    Args:
        gram: the Gram matrix of the inputs, float32.
        kernel: the dense kernel, float32.
        changes: [groups], how much the loss changes without each group, squared and summed over
            tokens, float32; see `Sensitivity.units`. The number of groups divides the number of
            inputs.
        keep: how many groups stay.

    Returns:
        The indices of the groups that stay, sorted; the rows of their inputs, re-optimized; and the
        relative error ‖XW₀ − XW‖² / ‖XW₀‖² on the calibration tokens.
    """
    kept = np.flatnonzero(fetch(selected(keep, gram, kernel, changes)))
    size = len(gram) // len(changes)
    rows = (kept[:, None] * size + np.arange(size)).reshape(-1)
    weights, error = optimum(gram, kernel, jnp.asarray(rows, jnp.int32))
    return kept, weights, float(fetch(error))


@partial(jax.jit, static_argnums=0)
def selected(
    keep: int,
    gram: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    changes: Float[Array, "groups"],
) -> Bool[Array, "groups"]:
    """Returns which groups stay; arguments as for `remove_inputs`."""
    groups = len(changes)
    step = math.ceil((groups - keep) / STEPS)
    steps, last = divmod(groups - keep, step)
    scaled = _scaled(gram)
    size = len(gram) // groups
    weights = kernel * scaled.scale[:, None]
    by_loss = factors(scaled.gram, weights, changes)

    def remove(count: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        inverted, weights, alive = state
        _, chosen = jax.lax.top_k(-_costs(inverted, weights, by_loss, alive), count)
        rows = (chosen[:, None] * size + jnp.arange(size, dtype=chosen.dtype)[None]).reshape(-1)
        columns = inverted[:, rows]
        block = inverse(columns[rows])
        weights = weights - matmul(columns, matmul(block, weights[rows]))
        inverted = inverted - matmul(columns, matmul(block, columns.T))
        # What is left there is rounding: the removed inputs no longer matter.
        weights = weights.at[rows].set(0)
        inverted = inverted.at[rows].set(0).at[:, rows].set(0)
        return inverted, weights, alive.at[chosen].set(False)

    state = (
        inverse(scaled.gram),
        weights,
        jnp.ones((groups,), jnp.bool_),
    )
    state = jax.lax.fori_loop(0, steps, lambda _, state: remove(step, state), state)
    return (remove(last, state) if last else state)[2]


def _scaled(gram: Float[Array, "n n"]) -> Scaled:
    """Returns the Gram matrix with a diagonal of ones, damped. Without any tokens, all inputs count
    equally."""
    equal = jnp.eye(len(gram), dtype=gram.dtype)
    return precondition(jnp.where(jnp.trace(gram) > 0, gram, equal), DAMPING)


def factors(
    gram: Float[Array, "n n"], weights: Float[Array, "n m"], changes: Float[Array, "groups"]
) -> Float[Array, "groups"]:
    """Returns √(c_g / tr(W_gᵀ H_gg W_g)), whose mean is 1 before the square root."""
    rows = weights.reshape(len(changes), -1, weights.shape[1])
    outputs = jnp.sum(rows * matmul(_blocks(gram, len(changes)), rows), axis=(1, 2))
    ratios = changes / jnp.maximum(outputs, jnp.finfo(outputs.dtype).tiny)
    mean = jnp.mean(ratios)
    ratios = jnp.where(mean > 0, ratios / mean, jnp.ones_like(ratios))
    return jnp.sqrt(jnp.maximum(ratios, LEAST))


def _blocks(matrix: Float[Array, "n n"], groups: int) -> Float[Array, "groups size size"]:
    """Returns the blocks on the diagonal."""
    size = len(matrix) // groups
    places = jnp.arange(groups)
    return matrix.reshape(groups, size, groups, size)[places, :, places, :]


def _costs(
    inverted: Float[Array, "n n"],
    weights: Float[Array, "n m"],
    by_loss: Float[Array, "groups"],
    alive: Bool[Array, "groups"],
) -> Float[Array, "groups"]:
    """Returns what the removal of each group costs; infinity for those that are gone."""
    groups = len(alive)
    size = len(inverted) // groups
    if size == 1:
        costs = jnp.sum(weights * weights, axis=1) / jnp.diagonal(inverted)
    else:
        own = _blocks(inverted, groups)
        own = jnp.where(alive[:, None, None], own, jnp.eye(size, dtype=own.dtype))
        rows = weights.reshape(groups, size, -1)
        costs = jnp.sum(rows * jnp.linalg.solve(own, rows), axis=(1, 2))
    return jnp.where(alive, by_loss * costs, jnp.inf)


@jax.jit
def optimum(
    gram: Float[Array, "n n"], kernel: Float[Array, "n m"], rows: Int[Array, "k"]
) -> tuple[Float[Array, "k m"], Float[Array, ""]]:
    """Returns the optimal rows where all other rows are zero, and the relative error."""
    scaled = _scaled(gram)
    some = scaled.gram[rows]
    wanted = matmul(some, kernel * scaled.scale[:, None])
    found = matmul(inverse(some[:, rows]), wanted) / scaled.scale[rows][:, None]
    difference = kernel.at[rows].add(-found)
    total = quadratic(gram, kernel)
    return found, quadratic(gram, difference) / jnp.where(total > 0, total, jnp.ones_like(total))
