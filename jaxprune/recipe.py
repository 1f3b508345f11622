"""What is done to a model, as plain data: a recipe, and the presets.

A recipe is equal to another of the same values, hashable, and goes to JSON and back without loss.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field

from convert.schema import Schema, check, parse
from jaxprune import methods
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method
from jaxprune.methods.admm import ADMM
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.quantization import BITS
from jaxprune.methods.records import MethodRecord, method_as_json
from jaxprune.recipe_parts import Experts, Importance, Rule, Tuning, late_sparsity, without_effect
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import (
    NM,
    GivenRecord,
    NMRecord,
    Pattern,
    PatternRecord,
    Unstructured,
    UnstructuredRecord,
    parse_pattern,
    percent,
)

VERSION = 2
"""Of the JSON."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to each linear layer, and to all of them together.

    Attributes:
        method: selects masks and updates weights, or only updates where the masks are given.
        pattern: the pattern of every linear layer; None: the masks are given.
        mask: name of the given masks, `from-checkpoint:DIR` or `from-file:FILE`; None where there
            is a pattern.
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

    method: Method = ADMM()
    pattern: Pattern | None = Unstructured(0.5)
    mask: str | None = None
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    preset: str | None = None
    asymmetry: float = 0.0
    rules: tuple[Rule, ...] = ()
    experts: Experts = Experts()
    quantize: str | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.mask is None):
            raise InputError("a recipe has either a pattern or masks that were made elsewhere")
        if self.pattern is None and any(rule.pattern for rule in self.rules):
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

    def at(
        self, pattern: Pattern | str | float | None = None, sparsity: float | None = None
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
        return dataclasses.replace(
            self, pattern=found, mask=None, importance=importance, tuning=tuning
        )

    def target(self) -> Pattern | masks.Masks:
        """Returns the pattern, or the masks that were made elsewhere.

        Raises:
            InputError, CheckpointError: they cannot be read.
        """
        return masks.load(self.mask) if self.mask is not None else self.pattern  # type: ignore[return-value]

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `RecipeRecord`."""
        pattern = (
            {"kind": "given", "mask": self.mask} if self.pattern is None else self.pattern.as_json()
        )
        return {
            "method": method_as_json(self.method),
            "pattern": pattern,
            "preset": self.preset,
            "asymmetry": self.asymmetry,
            "importance": dataclasses.asdict(self.importance),
            "tuning": self.tuning.as_json(),
            **({"rules": [rule.as_json() for rule in self.rules]} if self.rules else {}),
            **({"experts": dataclasses.asdict(self.experts)} if self.experts != Experts() else {}),
            **({"quantize": self.quantize} if self.quantize else {}),
        }

    def to_json(self) -> str:
        """Returns the recipe as JSON text, from which `from_json` makes an equal one."""
        return json.dumps({"schema": VERSION} | self.as_json(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Returns the recipe of a JSON text.

        Raises:
            InputError: it is no recipe, or of another version; a method or one of its options is
                not known.
        """
        return parse(VersionedRecord, text, file="", error=InputError).recipe()

    @property
    def record(self) -> "RecipeRecord":
        """The recipe as records keep it."""
        parts = {"importance": self.importance, "tuning": self.tuning, "experts": self.experts}
        return check(RecipeRecord, self.as_json() | parts, file="")

    @property
    def pattern_text(self) -> str:
        """The pattern or the masks' source, in words."""
        return self.record.pattern_text

    @property
    def method_text(self) -> str:
        """The method and what is done beside it, in words."""
        return self.record.method_text

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
        dropped = f"-without-{percent(self.experts.drop_experts)}" * (self.experts.drop_experts > 0)
        patterns = self.record.patterns_of_all
        if patterns and not any(patterns):
            return f"experts{dropped}" if dropped else "dense"
        how += dropped
        if self.pattern is None:
            return f"{how}-given-mask"
        if self.preset:
            uniform = (
                self.pattern == Unstructured(self.pattern.sparsity) and not self.importance.spread
            )
            how = self.preset + "-uniform" * uniform + dropped
        if len(patterns) > 1:
            return f"{how}-rules"
        pattern = next(iter(patterns), self.pattern)
        assert pattern is not None
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


def decided_by(
    patterns: Collection[Pattern | None], recipe: "Recipe | RecipeRecord"
) -> dict[str, Any]:
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


class RuleRecord(Schema):
    """The JSON of a rule."""

    names: str
    pattern: UnstructuredRecord | NMRecord | None

    def rule(self) -> Rule:
        """Returns the rule that it is the JSON of."""
        return Rule(self.names, self.pattern.pattern() if self.pattern else None)

    def __str__(self) -> str:
        return f"{self.names} {self.pattern or 'dense'}"


class RecipeRecord(Schema):
    """The JSON of a recipe. It is read without the methods that it names, which need not be
    installed."""

    method: MethodRecord
    pattern: PatternRecord
    preset: str | None = None
    asymmetry: float = Field(default=0.0, ge=0, le=1)
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    rules: list[RuleRecord] = []
    experts: Experts = Experts()
    quantize: str | None = Field(default=None, pattern=f"^({'|'.join(BITS)})$")

    def recipe(self) -> Recipe:
        """Returns the recipe.

        Raises:
            InputError: a method or one of its options is not there, or has another type or range.
        """
        mask = self.pattern.mask if isinstance(self.pattern, GivenRecord) else None
        return Recipe(
            self.method.method(),
            self.pattern.pattern(),
            mask,
            self.importance,
            self.tuning,
            self.preset,
            self.asymmetry,
            tuple(rule.rule() for rule in self.rules),
            self.experts,
            self.quantize,
        )

    @property
    def patterns_of_all(self) -> frozenset[Pattern | None]:
        """The patterns that rules give, where they are known to name every linear layer: of the
        last rule `*`, and of those after it. None: dense. Empty: some linear layers may have the
        recipe's pattern."""
        every = [place for place, rule in enumerate(self.rules) if rule.names == "*"]
        return (
            frozenset(one.rule().pattern for one in self.rules[every[-1] :])
            if every
            else frozenset()
        )

    @property
    def effective(self) -> Self:
        """The recipe without what changes nothing, because rules name every linear layer."""
        patterns = self.patterns_of_all
        return self.model_copy(update=decided_by(patterns, self)) if patterns else self

    @property
    def all_dense(self) -> bool:
        """Whether rules are known to leave every linear layer dense."""
        return self.patterns_of_all == {None}

    @property
    def pattern_text(self) -> str:
        """The pattern or the masks' source, in words; the rules alone where they name every linear
        layer."""
        total = f"{self.pattern}" + " in total" * (self.importance.spread > 0)
        return ", ".join([*[total] * (not self.patterns_of_all), *map(str, self.rules)])

    @property
    def method_text(self) -> str:
        """The method and what is done beside it, in words."""
        return self.effective._method_text()

    def _method_text(self) -> str:
        late = late_sparsity(self.tuning, self.pattern.pattern())
        words = [
            "linear layers left dense" if self.all_dense else str(self.method),
            *["tokens weighed"] * (self.importance.token_power > 0),
            *["outputs weighed"] * self.importance.weigh_outputs,
            *[f"sparsities within {self.importance.spread:g}"] * (self.importance.spread > 0),
            *[f"asymmetry {self.asymmetry:g}"] * (self.asymmetry > 0),
            *[f"{self.tuning.tune_epochs:g} epochs of tuning"] * (self.tuning.tune_epochs > 0),
            *[f"tuned on {self.tuning.tune_tokens:,} tokens"] * (self.tuning.tune_tokens > 0),
            *[f"the last {100 * late:g} % of the weights go meanwhile"] * (late > 0),
            *[f"windows in {self.tuning.tune_pieces} pieces"]
            * (self.tuning.tunes and self.tuning.tune_pieces > 1),
            *[f"{percent(self.experts.drop_experts)} % of experts dropped"]
            * (self.experts.drop_experts > 0),
            *["all tokens to all experts"] * self.experts.route_all,
            *[f"quantized to {(self.quantize or '').upper()}"] * (self.quantize is not None),
        ]
        return f"{self.preset}: " * (self.preset is not None) + ", ".join(words)


class VersionedRecord(RecipeRecord):
    """The JSON of a recipe that stands alone."""

    version: Literal[2] = Field(alias="schema")
