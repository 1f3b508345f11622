"""Recipes and presets: how to prune, tune and quantize a model, as plain data.

Recipes compare by value, are hashable, and convert to JSON and back without loss.
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
from jaxprune.methods.method_json import StoredMethod, text_of
from jaxprune.methods.quantization import BITS
from jaxprune.recipe_parts import (
    Importance,
    Rule,
    Structure,
    Tuning,
    gradual_sparsity,
    without_effect,
)
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
"""The version of the JSON."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How each linear layer is pruned, and how all of them are tuned together.

    Attributes:
        method: selects masks and updates weights, or only updates weights under given masks.
        pattern: the pattern of every linear layer, or given masks.
        importance: how the gradients of the loss weigh tokens, outputs and layers.
        tuning: how the kept weights are tuned after all linear layers are pruned.
        preset: the name of the preset that the recipe was made from, or None.
        asymmetry: the fraction of the activation shift, from 0 to 1, that weights compensate. 0
            preserves a layer's own output on its pruned inputs, 1 targets the dense model's output.
        rules: exceptions for linear layers: another pattern, or none. The last rule that matches a
            layer applies. If rules match every linear layer, `pattern` has no effect.
        structure: the parts of the model that are removed before pruning.
        route_all: whether, during calibration, every token is sent to every expert, weighted by its
            routing probability; otherwise an expert sees only the tokens routed to it.
        quantize: the GGUF type, from `methods.quantization.BITS`, to whose grid all linear layers
            are quantized at the end; None: no quantization.

    Raises:
        InputError: some values exclude each other.
    """

    method: StoredMethod = ADMM()
    pattern: RecipePattern = Unstructured(0.5)
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    preset: str | None = None
    asymmetry: float = 0.0
    rules: tuple[Rule, ...] = ()
    structure: Structure = Structure()
    route_all: bool = False
    quantize: str | None = None
    __pydantic_config__ = OWN

    def __post_init__(self) -> None:
        if isinstance(self.pattern, Given) and any(rule.pattern for rule in self.rules):
            raise InputError(
                "a rule gives a pattern, but the given masks decide which weights stay"
            )
        if not 0 <= self.asymmetry <= 1:
            raise InputError(f"asymmetry must lie between 0 and 1, not {self.asymmetry}")
        if self.quantize not in (None, *BITS):
            raise InputError(f"quantize must be {' or '.join(BITS)}, not {self.quantize!r}")
        values = vars(self.importance) | vars(self.tuning)
        for field, reason in without_effect(self.pattern).items():
            if values[field]:
                raise InputError(f"{field} has no effect: {reason}", options={field: Change.OMIT})

    @property
    def prunes(self) -> bool:
        """Whether any linear layer gets zeros: a pattern with sparsity 0 and rules may say none."""
        every = self.patterns_of_all or {self.pattern, *(rule.pattern for rule in self.rules)}
        return any(isinstance(one, Given) or (one and one.sparsity > 0) for one in every)

    @property
    def mask(self) -> str | None:
        """The name of the given masks; None if the recipe has a pattern."""
        return self.pattern.mask if isinstance(self.pattern, Given) else None

    def at(
        self, pattern: OwnPattern | str | float | None = None, sparsity: float | None = None
    ) -> "Recipe":
        """Returns the recipe with another pattern, without the options that have no effect under
        it.

        Args:
            pattern: a pattern, its name (unstructured, per-output, or N:M such as 2:4), or a
                sparsity; None: the kind of the recipe's pattern.
            sparsity: fraction of zeros, if the pattern does not define it; None: 0.5, or the
                sparsity of N:M.

        Raises:
            InputError: the pattern is unknown or has another sparsity, or two sparsities are given.
        """
        if isinstance(pattern, NM):  # the same rule as for its name
            pattern = str(pattern)
        if not (pattern is None or isinstance(pattern, str) or sparsity is None):
            raise InputError(f"give one sparsity, not both {pattern} and {sparsity}")
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
        """Returns the pattern, or the given masks.

        Raises:
            InputError, CheckpointError: the masks cannot be read.
        """
        return masks.load(self.pattern.mask) if isinstance(self.pattern, Given) else self.pattern

    def to_json(self) -> str:
        """Returns the recipe as JSON text; `from_json` creates an equal recipe from it."""
        return to_text({"schema": VERSION} | dump(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Returns the recipe of a JSON text. A method that is not installed becomes a
        `NotInstalled`.

        Raises:
            InputError: the text is not a recipe of this version.
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
        """The patterns that rules give if they are known to match every linear layer: those of the
        last rule `*` and of the rules after it. None in the set means dense. An empty set means
        that some linear layers may have the recipe's pattern."""
        every = [place for place, rule in enumerate(self.rules) if rule.names == "*"]
        return frozenset(one.pattern for one in self.rules[every[-1] :]) if every else frozenset()

    @property
    def pattern_text(self) -> str:
        """A description of the pattern or of the masks' source."""
        return pattern_text(self, self.patterns_of_all)

    @property
    def method_text(self) -> str:
        """A description of the method and of all other steps."""
        return method_text(self, self.patterns_of_all)

    @property
    def slug(self) -> str:
        """A short name for files, such as wanda-admm-50 or fast-50-q4_0; it differs between
        sparsities."""
        return f"{self._pruning}-{self.quantize}" if self.quantize else self._pruning

    @property
    def _pruning(self) -> str:
        """The part of `slug` without the quantization."""
        method = self.method.method if isinstance(self.method, Finished) else self.method
        crossed = [method.selector, method.updater] if isinstance(method, Crossed) else [method]
        how = "-".join(map(methods.name_of, crossed))
        removed = self.structure.removed.values()
        dropped = "".join(
            f"-without-{words.replace(' % of ', '-').replace(' ', '-')}" for words in removed
        )
        patterns = self.patterns_of_all
        if not self.prunes and dropped:
            tuned = self.preset if self.tuning.tunes and any(patterns or [True]) else None
            return f"{tuned or 'dense'}{dropped}"
        if patterns and not any(patterns):
            return "dense"
        how += dropped
        if isinstance(self.pattern, Given):
            return f"{how}-given-mask"
        if self.preset:
            how = self.preset + dropped
            if (
                self.pattern == Unstructured(self.pattern.sparsity)
                and not self.importance.max_deviation
            ):
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


_IMPORTANCE = Importance(weigh_outputs=True, max_deviation=0.3, sensitivity_windows=8)
_TUNINGS = {
    "fast": Tuning(tune_epochs=0.3125, tune_chunks=4),
    "best": Tuning(tune_epochs=2.0, tune_gradual=0.25),
    "thorough": Tuning(tune_tokens=1_000_000, tune_chunks=2, tune_gradual=0.25),
}
PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        name: Recipe(ADMM(damping=0.03), importance=_IMPORTANCE, tuning=tuning, preset=name)
        for name, tuning in _TUNINGS.items()
    }
)
"""Recipes for most uses. All weigh outputs by the gradients of the loss, give every linear layer
its own sparsity and tune the kept weights. `best` tunes longer than `fast`; `thorough` tunes on a
text of its own."""


def decided_by(patterns: Collection[Pattern | None], recipe: Recipe) -> dict[str, Any]:
    """Returns the fields of a recipe that change because rules match every linear layer.

    Sparsities are then not allocated, and no zeros are left to gradual pruning. If all linear
    layers stay dense, there is no reverse pass and no tuning.

    Args:
        patterns: the patterns that the rules give; None: dense.
        recipe: the recipe.
    """
    if not any(patterns):
        return {"importance": Importance(), "tuning": Tuning(), "asymmetry": 0.0}
    return {
        "importance": recipe.importance.without(["max_deviation"]),
        "tuning": recipe.tuning.without(["tune_gradual"]),
    }


def effective(recipe: Recipe, patterns: Collection[Pattern | None]) -> Recipe:
    """Returns a recipe without the options that have no effect because rules match every linear
    layer.

    Args:
        recipe: the recipe.
        patterns: the patterns that the rules give; empty if they do not match every linear layer.
    """
    return dataclasses.replace(recipe, **decided_by(patterns, recipe)) if patterns else recipe


def pattern_text(recipe: Recipe, patterns: Collection[Pattern | None]) -> str:
    """Returns a description of the pattern or the masks' source, and of the rules; only of the
    rules if they match every linear layer. Arguments as for `effective`."""
    words = [str(rule) for rule in recipe.rules]
    if not patterns:
        scope = " in total" if recipe.importance.max_deviation else ""
        words.insert(0, f"{recipe.pattern}{scope}")
    return ", ".join(words)


def method_text(recipe: Recipe, patterns: Collection[Pattern | None]) -> str:
    """Returns a description of the method and of all other steps. Arguments as for `effective`."""
    recipe = effective(recipe, patterns)
    importance, tuning = recipe.importance, recipe.tuning
    gradual = gradual_sparsity(tuning, recipe.pattern)
    removed = dict.fromkeys(
        (f"{words} dropped" for words in recipe.structure.removed.values()), True
    )
    method = "linear layers left dense" if {*patterns} == {None} else text_of(recipe.method)
    done = {
        **({} if recipe.prunes else removed),
        method: recipe.prunes or not removed,
        "tokens weighed": importance.token_power,
        "outputs weighed": importance.weigh_outputs,
        f"sparsities within {importance.max_deviation:g}": importance.max_deviation,
        f"asymmetry {recipe.asymmetry:g}": recipe.asymmetry,
        f"{tuning.tune_epochs:g} epochs of tuning": tuning.tune_epochs,
        f"tuned on {tuning.tune_tokens:,} tokens": tuning.tune_tokens,
        f"the last {100 * gradual:g} % of the weights pruned gradually": gradual,
        f"windows in {tuning.tune_chunks} chunks": tuning.tunes and tuning.tune_chunks > 1,
        **(removed if recipe.prunes else {}),
        "all tokens to all experts": recipe.route_all,
        f"quantized to {(recipe.quantize or '').upper()}": recipe.quantize,
    }
    text = ", ".join(words for words, applies in done.items() if applies)
    return text if recipe.preset is None else f"{recipe.preset}: {text}"
