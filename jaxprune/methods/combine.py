"""Methods made of methods: one's mask with another's update, and a finish for any of them."""

import dataclasses
from typing import Any

from jaxprune.methods import Gram, Kernel, Mask, Method, Solution
from jaxprune.methods.exact import Exact
from jaxprune.sparsity.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Crossed:
    """One method's mask with another's weight update, from the dense weights.

    Attributes:
        selector: the method that selects the mask.
        updater: the method that updates the dense weights under that mask.
    """

    selector: Method
    updater: Method

    @property
    def per_output(self) -> bool:
        return self.selector.per_output

    def prepare(self, gram: Gram) -> tuple[Any, Any]:
        return self.selector.prepare(gram), self.updater.prepare(gram)

    def solve(self, prepared: tuple[Any, Any], weight: Kernel, pattern: Pattern | Mask) -> Solution:
        if isinstance(pattern, Pattern):
            pattern = self.selector.solve(prepared[0], weight, pattern).mask
        return self.updater.solve(prepared[1], weight, pattern)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A method whose weights are brought nearer to the optimum under its mask by conjugate
    gradients.

    Attributes:
        method: gives the mask and the weights to start from.
        finish: its steps, tolerance and damping.
    """

    method: Method
    finish: Exact

    @property
    def per_output(self) -> bool:
        return self.method.per_output

    def prepare(self, gram: Gram) -> tuple[Any, Any]:
        return self.method.prepare(gram), self.finish.prepare(gram)

    def solve(self, prepared: tuple[Any, Any], weight: Kernel, pattern: Pattern | Mask) -> Solution:
        solution = self.method.solve(prepared[0], weight, pattern)
        finished = self.finish.refine(prepared[1], weight, solution.weight, solution.mask)
        return finished._replace(metrics=solution.metrics | finished.metrics)
