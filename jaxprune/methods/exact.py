r"""The exact optimum of every column under a given mask, by conjugate gradients.

Minimises ‖XW₀ − XW‖²_F over W that are zero outside a mask. Columns are independent: each is a
least-squares problem on its own kept inputs S, G_SS w_S = (G w₀)_S. Conjugate gradients solve all
columns at once and never form G_SS. A step takes one product of n·n by n·m, and every column has
its own step length. G is scaled to unit diagonal and damped as in `admm`.

References:
    Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models", NeurIPS 2024 (arXiv 2406.07831), section 3.2, which takes ten such steps.
"""

import dataclasses
import math

import jax
from jaxtyping import Array, Int

from jaxprune.errors import InputError
from jaxprune.methods import UPDATES, Gram, Kernel, Mask, Solution
from jaxprune.methods.linalg import Scalar, Scaled, conjugate_gradients, masked, precondition
from jaxprune.methods.wanda import select
from jaxprune.sparsity.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Exact:
    """Solves for the kept weights to a tolerance.

    It selects Wanda's mask if none is given.
    """

    steps: int = dataclasses.field(default=500, metadata=UPDATES)
    """Maximum number of conjugate-gradient steps."""
    tolerance: float = dataclasses.field(default=1e-4, metadata=UPDATES)
    """Relative tolerance: conjugate gradients stop when the gradient of each output has shrunk to
    this fraction of its value at zero weights."""
    damping: float = dataclasses.field(default=0.0, metadata=UPDATES)
    """Ridge towards the dense weights, as a fraction of the mean diagonal of the scaled Gram
    matrix. 0 gives the optimum on the calibration tokens. If there are few of them, a ridge such as
    0.1 works better on other text."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if not (0 <= self.tolerance < math.inf and 0 <= self.damping < math.inf):
            raise InputError(
                f"tolerance and damping must be finite and not negative, not {self.tolerance} and "
                f"{self.damping}"
            )

    @property
    def per_output(self) -> bool:
        return True

    def prepare(self, gram: Gram) -> Scaled:
        return precondition(gram, self.damping)

    def solve(self, prepared: Scaled, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        mask = select(prepared.scale, weight, pattern) if isinstance(pattern, Pattern) else pattern
        return self.refine(prepared, weight, masked(mask, weight), mask)

    def refine(self, prepared: Scaled, weight: Kernel, start: Kernel, mask: Mask) -> Solution:
        """Solves from given starting weights instead of the masked dense ones."""
        return _refine(prepared, weight, start, mask, self.steps, self.tolerance)


@jax.jit
def _refine(
    prepared: Scaled,
    weight: Kernel,
    start: Kernel,
    mask: Mask,
    steps: int | Int[Array, ""],
    tolerance: Scalar,
) -> Solution:
    scale = prepared.scale[:, None]
    minimum = conjugate_gradients(
        prepared.gram, scale * weight, scale * start, mask, steps, tolerance
    )
    metrics = {"cg_steps": minimum.steps.astype(weight.dtype), "cg_residual": minimum.residual}
    return Solution(minimum.weight / scale, mask, metrics)
