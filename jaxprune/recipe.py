"""What is done to a model, as plain data: a recipe, and the presets.

A recipe is equal to another of the same values, hashable, and goes to JSON and back without loss.
"""

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from convert.schema import OWN, decode, dump, parse, to_text
from jaxprune import methods
from jaxprune.errors import Change, InputError
from jaxprune.methods.admm import ADMM
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.quantization import BITS
from jaxprune.methods.stored import StoredMethod, text_of
from jaxprune.recipe_parts import Experts, Importance, Rule, Tuning, late_sparsity, without_effect
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import (
    NM,
    Given,
    OwnPattern,
    Pattern,
    RecipePattern,
    Unstructured,
    parse_pattern,
    percent,
)

VERSION = 3
"""Of the JSON."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to each linear layer, and to all of them together.

    Attributes:
        method: selects masks and updates weights, or only updates where the masks are given.
        pattern: the pattern of every linear layer, or given masks.
        importance: what is weighed by the loss's gradients.
        tuning: what is done when all linear layers are pruned.
        preset: the name of the preset that it was made from, or None.
        asymmetry: the share, from 0 to 1, of what a linear layer's inputs lost in the layers before
            that its weights make up for. 0 keeps the layer's own output on its pruned inputs, 1
            aims at the dense model's.
        rules: linear layers that stay dense, or have a pattern of their own; of several that name
            one the last counts. Rules that name every linear layer decide alone, whatever the
            pattern is.
        experts: what is done to experts as such.
        quantize: the type, of `methods.quantization.BITS`, on whose grid all linear layers are
            brought at the very end; None: on none.

    Raises:
        InputError: values that exclude each other.
    """

    method: StoredMethod = ADMM()
    pattern: RecipePattern = Unstructured(0.5)
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    preset: str | None = None
    asymmetry: float = 0.0
    rules: tuple[Rule, ...] = ()
    experts: Experts = Experts()
    quantize: str | None = None
    __pydantic_config__ = OWN

    def __post_init__(self) -> None:
        if isinstance(self.pattern, Given) and any(rule.pattern for rule in self.rules):
            raise InputError(
                "a rule gives a pattern, where masks that were made elsewhere decide what stays"
            )
        if not 0 <= self.asymmetry <= 1:
            raise InputError(f"asymmetry must lie between 0 and 1, not {self.asymmetry}")
        if self.quantize not in (None, *BITS):
            raise InputError(f"quantize must be {' or '.join(BITS)}, not {self.quantize!r}")
        values = vars(self.importance) | vars(self.tuning)
        for field, reason in without_effect(self.pattern).items():
            if values[field]:
                raise InputError(
                    f"{field} changes nothing, for {reason}", options={field: Change.OMIT}
                )

    @property
    def mask(self) -> str | None:
        """The name of the given masks; None where there is a pattern."""
        return self.pattern.mask if isinstance(self.pattern, Given) else None

    def at(
        self, pattern: OwnPattern | str | float | None = None, sparsity: float | None = None
    ) -> "Recipe":
        """Returns the recipe with another pattern; what would have no effect under it is left out.

        Args:
            pattern: or its name: unstructured, per-output, or N:M such as 2:4; or a sparsity; None:
                the recipe's kind.
            sparsity: fraction of zeros, where the pattern has none; None: 0.5, or what N:M has.

        Raises:
            InputError: there is no such pattern, it has another sparsity, or two sparsities are
                given.
        """
        if isinstance(pattern, NM):  # the same rule as for its name
            pattern = str(pattern)
        if not (pattern is None or isinstance(pattern, str) or sparsity is None):
            raise InputError(f"one sparsity is enough: {pattern} and {sparsity} are given")
        if isinstance(pattern, int | float):
            pattern, sparsity = None, pattern
        if pattern is None and isinstance(self.pattern, NM):
            pattern = str(self.pattern)
        elif pattern is None:
            per_output = isinstance(self.pattern, Unstructured) and self.pattern.per_output
            pattern = "per-output" if per_output else "unstructured"
        found = parse_pattern(pattern, sparsity) if isinstance(pattern, str) else pattern
        useless = without_effect(found)
        importance, tuning = self.importance.without(useless), self.tuning.without(useless)
        return dataclasses.replace(self, pattern=found, importance=importance, tuning=tuning)

    def target(self) -> Pattern | masks.Masks:
        """Returns the pattern, or the masks that were made elsewhere.

        Raises:
            InputError, CheckpointError: they cannot be read.
        """
        return masks.load(self.pattern.mask) if isinstance(self.pattern, Given) else self.pattern

    def to_json(self) -> str:
        """Returns the recipe as JSON text, from which `from_json` makes an equal one."""
        return to_text({"schema": VERSION} | dump(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Returns the recipe of a JSON text.

        Raises:
            InputError: it is no recipe, or of another version. A method that is not there is a
                `NotInstalled`.
        """
        content = decode(text, file="", error=InputError)
        if (version := content.pop("schema", None)) != VERSION:
            raise InputError(
                "it is no recipe of this version",
                entry="schema",
                found=version,
                wanted=f"{VERSION}",
            )
        return parse(cls, to_text(content), file="", error=InputError)

    @property
    def patterns_of_all(self) -> frozenset[OwnPattern | None]:
        """The patterns that rules give, where they are known to name every linear layer: of the
        last rule `*`, and of those after it. None: dense. Empty: some linear layers may have the
        recipe's pattern."""
        every = [place for place, rule in enumerate(self.rules) if rule.names == "*"]
        return frozenset(one.pattern for one in self.rules[every[-1] :]) if every else frozenset()

    @property
    def pattern_text(self) -> str:
        """The pattern or the masks' source, in words."""
        return pattern_text(self, self.patterns_of_all)

    @property
    def method_text(self) -> str:
        """The method and what is done beside it, in words."""
        return method_text(self, self.patterns_of_all)

    @property
    def slug(self) -> str:
        """A short name for files, such as wanda-admm-50 or fast-50-q4_0; different sparsities have
        different ones."""
        return f"{self._pruning}-{self.quantize}" if self.quantize else self._pruning

    @property
    def _pruning(self) -> str:
        """The short name of what is done before the quantization."""
        method = self.method.method if isinstance(self.method, Finished) else self.method
        crossed = [method.selector, method.updater] if isinstance(method, Crossed) else [method]
        how = "-".join(map(methods.name_of, crossed))
        dropped = ""
        if self.experts.drop_experts:
            dropped = f"-without-{percent(self.experts.drop_experts)}"
        patterns = self.patterns_of_all
        if patterns and not any(patterns):
            return f"experts{dropped}" if dropped else "dense"
        how += dropped
        if isinstance(self.pattern, Given):
            return f"{how}-given-mask"
        if self.preset:
            how = self.preset + dropped
            if self.pattern == Unstructured(self.pattern.sparsity) and not self.importance.spread:
                how = f"{self.preset}-uniform{dropped}"
        if len(patterns) > 1:
            return f"{how}-rules"
        pattern = next(iter(patterns), self.pattern)
        assert isinstance(pattern, Unstructured | NM)
        return (
            f"{how}-{pattern.n}of{pattern.m}"
            if isinstance(pattern, NM)
            else f"{how}-{percent(pattern.sparsity)}"
        )


_IMPORTANCE = Importance(weigh_outputs=True, spread=0.3, sensitivity_windows=8)
_TUNINGS = {
    "fast": Tuning(tune_epochs=0.3125, tune_pieces=4),
    "best": Tuning(tune_epochs=2.0, tune_zeros=0.25),
    "thorough": Tuning(tune_tokens=1_000_000, tune_pieces=2, tune_zeros=0.25),
}
PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        name: Recipe(ADMM(damping=0.03), importance=_IMPORTANCE, tuning=tuning, preset=name)
        for name, tuning in _TUNINGS.items()
    }
)
"""Recipes that serve most: all weigh outputs by the loss's gradients, give every linear layer a
sparsity of its own and tune the kept weights; best tunes them for longer than fast, and thorough on
a text of its own."""


def decided_by(patterns: Collection[Pattern | None], recipe: Recipe) -> dict[str, Any]:
    """Returns the fields of a recipe that have other values, because rules name every linear layer.

    No sparsity is allocated then, and no zeros are left to the tuning. Where all linear layers stay
    dense, nothing is measured and nothing is tuned.

    Args:
        patterns: those that the rules give; None: dense.
        recipe: the recipe.
    """
    if not any(patterns):
        return {"importance": Importance(), "tuning": Tuning(), "asymmetry": 0.0}
    return {
        "importance": recipe.importance.without(["spread"]),
        "tuning": recipe.tuning.without(["tune_zeros"]),
    }


def effective(recipe: Recipe, patterns: Collection[Pattern | None]) -> Recipe:
    """Returns a recipe without what changes nothing, because rules name every linear layer.

    Args:
        recipe: the recipe.
        patterns: those that the rules give; empty where they do not name every linear layer.
    """
    return dataclasses.replace(recipe, **decided_by(patterns, recipe)) if patterns else recipe


def pattern_text(recipe: Recipe, patterns: Collection[Pattern | None]) -> str:
    """Returns the pattern or the masks' source, in words; the rules alone where they name every
    linear layer. Arguments as for `effective`."""
    words = [str(rule) for rule in recipe.rules]
    if not patterns:
        scope = " in total" if recipe.importance.spread else ""
        words.insert(0, f"{recipe.pattern}{scope}")
    return ", ".join(words)


def method_text(recipe: Recipe, patterns: Collection[Pattern | None]) -> str:
    """Returns the method and what is done beside it, in words. Arguments as for `effective`."""
    recipe = effective(recipe, patterns)
    importance, tuning, experts = recipe.importance, recipe.tuning, recipe.experts
    late = late_sparsity(tuning, recipe.pattern)
    method = "linear layers left dense" if {*patterns} == {None} else text_of(recipe.method)
    done = {
        method: True,
        "tokens weighed": importance.token_power,
        "outputs weighed": importance.weigh_outputs,
        f"sparsities within {importance.spread:g}": importance.spread,
        f"asymmetry {recipe.asymmetry:g}": recipe.asymmetry,
        f"{tuning.tune_epochs:g} epochs of tuning": tuning.tune_epochs,
        f"tuned on {tuning.tune_tokens:,} tokens": tuning.tune_tokens,
        f"the last {100 * late:g} % of the weights go meanwhile": late,
        f"windows in {tuning.tune_pieces} pieces": tuning.tunes and tuning.tune_pieces > 1,
        f"{percent(experts.drop_experts)} % of experts dropped": experts.drop_experts,
        "all tokens to all experts": experts.route_all,
        f"quantized to {(recipe.quantize or '').upper()}": recipe.quantize,
    }
    text = ", ".join(words for words, applies in done.items() if applies)
    return text if recipe.preset is None else f"{recipe.preset}: {text}"
