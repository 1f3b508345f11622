r"""The exact optimum of every column under a given mask, by conjugate gradients on its support.

Minimises ‖XW₀ − XW‖²_F over W that are zero outside a mask. Columns don't interact: each is a
least-squares problem on its own kept inputs S, G_SS w_S = (G w₀)_S. Conjugate gradients solve all
of them at once, each with step lengths of its own, by one product of n·n by n·m a step, and never
form G_SS. G is scaled to unit diagonal and damped as ADMM's.

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
    """Solves for the kept weights to a tolerance; where no mask is given, it selects Wanda's."""

    steps: int = dataclasses.field(default=500, metadata=UPDATES)
    """The most conjugate-gradient steps."""
    tolerance: float = dataclasses.field(default=1e-4, metadata=UPDATES)
    """Of the gradient of each output, relative to the one at zero weights."""
    damping: float = dataclasses.field(default=0.0, metadata=UPDATES)
    """Ridge towards the dense weights, in units of the mean diagonal of the scaled Gram matrix. 0
    is the optimum on the calibration tokens; where these are few, a ridge such as ADMM's 0.1 serves
    other text better."""

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
        """Solves from other weights than the masked dense ones."""
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
