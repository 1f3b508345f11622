"""Rules by name on a model: which linear layers stay dense, and which have a pattern of their own."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from jaxprune.errors import InputError
from jaxprune.models import Architecture
from jaxprune.recipe_parts import Rule
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern

Target = Pattern | StoredMask | None
"""A linear layer's pattern, or its mask where that was made elsewhere; None: it stays dense."""
TargetOf = Callable[[int, str], Target]
"""(layer index, path of the linear layer) -> its target."""


def by_rules(architecture: Architecture, rules: Sequence[Rule]) -> Mapping[tuple[int, str], Pattern | None]:
    """Returns the linear layers that rules name, with their patterns; the last rule that names one counts.

    Routers stay dense unless a rule gives their own name and a pattern, such as `*.mlp.gate`.

    Raises:
        InputError: a rule names no linear layer.
    """
    every = architecture.kernel_shapes(routers=True)
    found: dict[tuple[int, str], Pattern | None] = {which: None for which in every if architecture.is_router(*which)}
    for rule in rules:
        named = [which for which in every if rule.matches(*which)]
        if rule.pattern and rule.names.endswith("*"):  # all that is below a name is no name of a router
            named = [which for which in named if not architecture.is_router(*which)]
        if not named:
            names = [f"layers.{index}.{path}" for index, path in every]
            near = difflib.get_close_matches(rule.names, names, n=3, cutoff=0.3) or names[:3]
            raise InputError(f"no linear layer is named {rule.names!r}", wanted=f"names such as {', '.join(near)}")
        found |= dict.fromkeys(named, rule.pattern)
    return found


def with_rules(target: Pattern | TargetOf, named: Mapping[tuple[int, str], Pattern | None]) -> TargetOf:
    """Returns the target of each linear layer: its own where a rule names it.

    Args:
        target: of the others.
        named: as `by_rules` gives it.
    """

    def target_of(index: int, path: str) -> Target:
        if (index, path) in named:
            return named[index, path]
        return target(index, path) if callable(target) else target

    return target_of
