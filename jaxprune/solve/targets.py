"""Rules by name on a model: which linear layers stay dense, and which have a pattern of their
own."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxprune.errors import Change, InputError
from jaxprune.models import Architecture
from jaxprune.recipe import Recipe, decided_by
from jaxprune.recipe_parts import Rule
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern

Target = Pattern | StoredMask | None
"""A linear layer's pattern, or its mask where that was made elsewhere; None: it stays dense."""
TargetOf = Callable[[int, str], Target]
"""(layer index, path of the linear layer) -> its target."""


def by_rules(
    architecture: Architecture, rules: Sequence[Rule]
) -> Mapping[tuple[int, str], Pattern | None]:
    """Returns the linear layers that rules name, with their patterns; the last rule that names one
    counts.

    Routers stay dense unless a rule gives their own name and a pattern, such as `*.mlp.gate`.

    Raises:
        InputError: a rule names no linear layer.
    """
    every = architecture.kernel_shapes(routers=True)
    found: dict[tuple[int, str], Pattern | None] = {
        which: None for which in every if architecture.is_router(*which)
    }
    for rule in rules:
        named = [which for which in every if rule.matches(*which)]
        # all that is below a name is no name of a router
        if rule.pattern and rule.names.endswith("*"):
            named = [which for which in named if not architecture.is_router(*which)]
        if not named:
            names = [f"layers.{index}.{path}" for index, path in every]
            near = difflib.get_close_matches(rule.names, names, n=3, cutoff=0.3) or names[:3]
            raise InputError(
                f"no linear layer is named {rule.names!r}",
                wanted=f"names such as {', '.join(near)}",
            )
        found |= dict.fromkeys(named, rule.pattern)
    return found


def with_rules(
    target: Pattern | TargetOf, named: Mapping[tuple[int, str], Pattern | None]
) -> TargetOf:
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


def targets_for(architecture: Architecture, target: Pattern | TargetOf) -> TargetOf:
    """Returns the target of each linear layer, once it is known to fit; errors as for
    `require_fit`."""
    target_of = (
        with_rules(target, by_rules(architecture, ())) if isinstance(target, Pattern) else target
    )
    for (index, path), shape in architecture.kernel_shapes(routers=True).items():
        if (wanted := target_of(index, path)) is not None:
            require_fit(wanted, index, path, shape)
    return target_of


def require_fit(
    target: Pattern | StoredMask, index: int, path: str, shape: tuple[int, ...]
) -> None:
    """Raises InputError where a pattern is impossible for a kernel's shape, or a mask has
    another."""
    if isinstance(target, Pattern):
        target.selector(shape)
    elif target.shape != shape:
        raise InputError(
            f"the mask of layers.{index}.{path} is {list(target.shape)}, but its kernel [in, out] "
            f"is {list(shape)}: "
            "the mask was made for another model"
        )


class Counts(NamedTuple):
    """Weights of linear layers by shapes alone; a router counts only where a rule gives it a
    pattern.

    Attributes:
        weights: of all linear layers.
        zeros: that rules give.
        rounding: the most that `zeros` differs from the rules' fractions by rounding to whole
            weights.
        unnamed: linear layers that no rule names -> their weights.
    """

    weights: int
    zeros: int
    rounding: float
    unnamed: dict[tuple[int, str], int]


def count_weights(
    architecture: Architecture, named: Mapping[tuple[int, str], Pattern | None]
) -> Counts:
    """Counts the weights of linear layers, and the zeros that rules give.

    Args:
        architecture: the architecture of the model.
        named: as `by_rules` gives it.
    """
    weights, zeros, rounding, unnamed = 0, 0, 0.0, {}
    for which, shape in architecture.kernel_shapes(routers=True).items():
        pattern = named.get(which)
        if pattern is None and architecture.is_router(*which):
            continue
        weights += math.prod(shape)
        if which not in named:
            unnamed[which] = math.prod(shape)
        elif pattern:
            zeros += pattern.zeros(shape)
            rounding += abs(pattern.zeros(shape) - pattern.sparsity * math.prod(shape))
    return Counts(weights, zeros, rounding, unnamed)


def require_sparsity(architecture: Architecture, recipe: Recipe, sparsity: float) -> None:
    """Raises InputError where rules name every linear layer and miss the sparsity that the user
    asked for.

    Args:
        architecture: the architecture of the model.
        recipe: its rules decide.
        sparsity: the fraction of zeros of all linear layers together.
    """
    counts = count_weights(architecture, by_rules(architecture, recipe.rules))
    if not counts.unnamed and abs(counts.zeros - sparsity * counts.weights) > counts.rounding + 0.5:
        raise InputError(
            "the rules name every linear layer and give a sparsity of "
            f"{counts.zeros / counts.weights} in total, "
            f"not {sparsity}",
            options={"sparsity": Change.OMIT},
        )


def effective_recipe(architecture: Architecture, recipe: Recipe) -> Recipe:
    """Returns the recipe without what changes nothing on a model, because rules name every linear
    layer.

    Raises:
        InputError: a rule names no linear layer.
    """
    named = by_rules(architecture, recipe.rules)
    if architecture.kernel_shapes().keys() - named.keys():
        return recipe
    return dataclasses.replace(recipe, **decided_by(named.values(), recipe))
