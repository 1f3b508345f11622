r"""Selects the inputs of a linear layer that matter least, and re-optimizes the others exactly.

The selection is ADMM (`methods.admm`) under a pattern that keeps whole groups of inputs. In each of
its iterations the groups with the largest scores stay. With V = W + U in the scaled coordinates of
ADMM, the score of the group g is

    ‖V_g‖² · √(c_g / tr(W₀_gᵀ G_gg W₀_g))

‖V_g‖² measures the error of the layer's output. The other factor measures how much the loss depends
on that error: c_g is the first-order change of the loss without the group, squared and summed over
tokens, and the trace is the same change of the output. At the end the remaining weights are solved
for exactly: W_K = H_KK⁻¹ H_K· W₀, with the damped Gram matrix H of the inputs.

References:
    Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024 (arXiv
    2401.02938), Algorithm 1.
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (arXiv
    1906.10771), for c_g.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.methods.admm import ADMM
from jaxprune.methods.linalg import Scaled, inverse, matmul, precondition, quadratic
from jaxprune.sharding import fetch
from jaxprune.sparsity.selection import Mask, Scores, Selector, counts, keep_largest

METHOD = ADMM(damping=0.2)
"""Selects the inputs. Its damping is that of the re-optimization too."""
LEAST = 1e-6
"""The smallest ratio of a change of the loss to that of the output, as a fraction of the mean."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """A pattern that keeps whole groups of consecutive inputs.

    Attributes:
        keep: how many groups stay.
        factors: [groups], the factors of their scores.
    """

    keep: int
    factors: Float[Array, "groups"]

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / len(self.factors)

    @property
    def group(self) -> None:
        return None

    def selector(self, shape: tuple[int, ...], progress: Sequence[float] = (1.0,)) -> Selector:
        zeros = counts(len(self.factors), self.sparsity, progress)
        return _GroupSelector(zeros, keep_largest, self.factors)

    def zeros(self, shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] // len(self.factors) * (len(self.factors) - self.keep)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _GroupSelector(Selector):
    """Selects groups of inputs by the sum of their squared scores, times factors."""

    factors: Float[Array, "groups"]

    def __call__(self, scores: Scores, step: int | Int[Array, ""] = -1) -> Mask:
        groups = len(self.factors)
        energies = jnp.sum(scores * scores, axis=1).reshape(groups, -1).sum(axis=1)
        kept = self.rule((energies * self.factors)[:, None], self.zeros[step])
        return jnp.broadcast_to(jnp.repeat(kept, len(scores) // groups, axis=0), scores.shape)


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
    scaled = _scaled(gram)
    weights = kernel * scaled.scale[:, None]
    pattern = Groups(keep, factors(scaled.gram, weights, changes))
    found = METHOD.solve(METHOD.prepare(_known(gram)), kernel, pattern)
    return found.mask.reshape(len(changes), -1)[:, 0]


def _known(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the Gram matrix; without any tokens, that of inputs which all count equally."""
    equal = jnp.eye(len(gram), dtype=gram.dtype)
    return jnp.where(jnp.trace(gram) > 0, gram, equal)


def _scaled(gram: Float[Array, "n n"]) -> Scaled:
    """Returns the Gram matrix with a diagonal of ones, damped."""
    return precondition(_known(gram), METHOD.damping)


def factors(
    gram: Float[Array, "n n"], weights: Float[Array, "n m"], changes: Float[Array, "groups"]
) -> Float[Array, "groups"]:
    """Returns √(c_g / tr(W_gᵀ G_gg W_g)), with means of 1 below the square root."""
    groups, places = len(changes), jnp.arange(len(changes))
    blocks = gram.reshape(groups, len(gram) // groups, groups, -1)[places, :, places, :]
    rows = weights.reshape(groups, -1, weights.shape[1])
    outputs = jnp.sum(rows * matmul(blocks, rows), axis=(1, 2))
    ratios = changes / jnp.maximum(outputs, jnp.finfo(outputs.dtype).tiny)
    mean = jnp.mean(ratios)
    ratios = jnp.where(mean > 0, ratios / mean, jnp.ones_like(ratios))
    return jnp.sqrt(jnp.maximum(ratios, LEAST))


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
