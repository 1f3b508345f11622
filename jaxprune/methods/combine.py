"""Methods built from other methods: one method's mask with another's update, or any method with a
finish."""

import dataclasses
from typing import Any

from jaxprune.methods import Gram, Kernel, Mask, Method, Solution
from jaxprune.methods.exact import Exact
from jaxprune.sparsity.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Crossed:
    """One method's mask with another method's update of the dense weights.

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
    """A method followed by conjugate gradients, which bring its weights nearer to the optimum under
    its mask.

    Attributes:
        method: selects the mask and computes the starting weights.
        finish: the steps, tolerance and damping of the conjugate gradients.
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
