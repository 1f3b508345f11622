"""Applies rules by name to a model: which linear layers stay dense or have their own pattern."""

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
"""A pattern, or a mask from elsewhere; None: the linear layer stays dense."""
TargetOf = Callable[[int, str], Target]
"""(layer index, path of the linear layer) -> its target."""


def by_rules(
    architecture: Architecture, rules: Sequence[Rule]
) -> Mapping[tuple[int, str], Pattern | None]:
    """Returns the linear layers that rules name, with their patterns.

    If several rules name a layer, the last one applies. Routers stay dense unless a rule with a
    pattern names them explicitly, such as `*.mlp.gate`.

    Raises:
        InputError: a rule names no linear layer.
    """
    every = architecture.kernel_shapes(routers=True)
    found: dict[tuple[int, str], Pattern | None] = {
        which: None for which in every if architecture.is_router(*which)
    }
    for rule in rules:
        named = [which for which in every if rule.matches(*which)]
        # a trailing wildcard does not name a router explicitly
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
    """Returns a function that gives the target of each linear layer under rules.

    Args:
        target: the target of layers that no rule names.
        named: the result of `by_rules`.
    """

    def target_of(index: int, path: str) -> Target:
        if (index, path) in named:
            return named[index, path]
        return target(index, path) if callable(target) else target

    return target_of


def targets_for(architecture: Architecture, target: Pattern | TargetOf) -> TargetOf:
    """Returns the target of each linear layer; raises as `require_fit` if one does not fit."""
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
    """Checks that a pattern or mask fits a kernel.

    Raises:
        InputError: the pattern is impossible for the shape, or the mask has another shape.
    """
    if isinstance(target, Pattern):
        target.selector(shape)
    elif target.shape != shape:
        raise InputError(
            f"the mask of layers.{index}.{path} is {list(target.shape)}, but its kernel [in, out] "
            f"is {list(shape)}: the mask was made for another model"
        )


class Counts(NamedTuple):
    """Numbers of weights of linear layers. A router counts only if a rule gives it a pattern.

    Attributes:
        weights: weights of all linear layers.
        zeros: zeros that rules require.
        rounding: the maximum difference of `zeros` from the rules' fractions, which comes from
            rounding to integers.
        unnamed: linear layers that no rule names -> number of weights.
    """

    weights: int
    zeros: int
    rounding: float
    unnamed: dict[tuple[int, str], int]


def count_weights(
    architecture: Architecture, named: Mapping[tuple[int, str], Pattern | None]
) -> Counts:
    """Counts the weights of linear layers, and the zeros that rules require.

    Args:
        architecture: the architecture of the model.
        named: the result of `by_rules`.
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
    """Checks a requested sparsity against rules that name every linear layer.

    Args:
        architecture: the architecture of the model.
        recipe: the recipe with the rules.
        sparsity: the requested fraction of zeros of all linear layers together.

    Raises:
        InputError: rules name every linear layer and give another sparsity.
    """
    counts = count_weights(architecture, by_rules(architecture, recipe.rules))
    if not counts.unnamed and abs(counts.zeros - sparsity * counts.weights) > counts.rounding + 0.5:
        raise InputError(
            "the rules name every linear layer and give a total sparsity of "
            f"{counts.zeros / counts.weights}, not {sparsity}",
            options={"sparsity": Change.OMIT},
        )


def effective_recipe(architecture: Architecture, recipe: Recipe) -> Recipe:
    """Returns the recipe without fields that have no effect on a model.

    If rules name every linear layer, some fields of the recipe have no effect.

    Raises:
        InputError: a rule names no linear layer.
    """
    named = by_rules(architecture, recipe.rules)
    if architecture.kernel_shapes().keys() - named.keys():
        return recipe
    return dataclasses.replace(recipe, **decided_by(named.values(), recipe))
