"""The options that say how kernels are pruned, of every command that prunes; a command line -> a
recipe."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxprune import methods
from jaxprune.commands.options import CommandLine, Section, make, real
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.recipe import PRESETS, Recipe
from jaxprune.recipe_parts import HOW_TUNED, Experts, Importance, Rule, Tuning, without_effect
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import Pattern, Unstructured, parse_pattern


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags that all methods share."""

    method: str | None = None
    """How to prune: selects the mask and updates the weights (default: admm)."""
    mask: str | None = None
    """Select the mask with another method; or take one made elsewhere, from-checkpoint:DIR (the
    zeros of a pruned checkpoint) or from-file:FILE (made by --save-masks)."""
    update: str | None = None
    """Update the dense weights under the mask with another method; exact solves for the optimum."""
    sparsity: float | None = None
    """Fraction of weights to set to zero in every linear layer (default: 0.5; N:M patterns have
    their own)."""
    pattern: str | None = None
    """unstructured (the smallest of a whole matrix go), per-output (of each output), or N:M, such
    as 2:4 (N of every M consecutive inputs stay). Default: as the mask's method was published."""
    finish_steps: int = 0
    """Bring the weights nearer to the optimum under the mask by so many conjugate-gradient steps at
    the end."""


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """The flags that only matter where a whole model is pruned."""

    preset: str | None = None
    """Options that serve most: all weigh outputs by the loss's gradients, give every linear layer a
    sparsity of its own, but for N:M, and tune the kept weights; best for longer than fast, and
    thorough on a million tokens (see --tune-tokens), for which --dry-run says how long it takes.
    Options given beside it win."""
    uniform: bool = False
    """The same sparsity for every linear layer, whatever the preset says."""
    asymmetry: float = 0.0
    """Let every linear layer make up for this share of what its inputs lost in the layers before: 0
    keeps its own output on its pruned inputs, 1 aims at the dense model's. Takes another forward
    pass."""
    quantize: Literal["q4_0", "q5_0"] | None = None
    """At the very end, bring all linear layers to the grid of this type of a GGUF file, those that
    --skip leaves dense too, for a file stores them alike; weights that stay make good what each
    loses. `jaxprune convert OUT OUT.gguf --type q4_0` then writes them as they are. Rounding to
    eight bits costs nothing, so there is no q8_0."""
    skip: tuple[str, ...] = ()
    """Leave linear layers dense, by name: 'layers.0.*' or '*.down_proj'; may be given several
    times."""
    rule: tuple[str, ...] = ()
    """Give linear layers a pattern of their own: NAMES=SPARSITY or NAMES=N:M, such as
    '*.q_proj=0.8' or 'layers.2[0-9].*=2:4'; may be given several times, and of two that name a
    linear layer the later counts. Where sparsities are spread, the others make up for it, so that
    --sparsity holds in total. Rules that name every linear layer decide alone."""

    def rules(self, pattern: Pattern | None) -> tuple[Rule, ...]:
        """Returns the rules beside a pattern; skipped linear layers stay dense whatever else names
        them.

        Raises:
            InputError: a rule has no pattern.
        """
        per_output = isinstance(pattern, Unstructured) and pattern.per_output
        return (*(_rule(text, per_output) for text in self.rule), *map(Rule, self.skip))


def _rule(text: str, per_output: bool) -> Rule:
    names, equals, pattern = text.rpartition("=")
    if not (names and equals):
        raise InputError(f"--rule takes NAMES=SPARSITY or NAMES=N:M, not {text!r}")
    if ":" in pattern:
        return Rule(names, parse_pattern(pattern))
    try:
        return Rule(names, Unstructured(real(pattern), per_output))
    except ValueError as error:
        raise InputError(f"--rule {text}: {error}") from None


class RecipeOptions:
    """The recipe's part of a command line. The methods that it names decide which flags there are.

    Args:
        line: the command line, of which only the methods' names are looked at.
        whole_model: whether a whole model is pruned, so that the options which need one are
            offered.

    Attributes:
        classes: role, mask or update, -> the method's class; one that does both is in the role of
            update.

    Raises:
        InputError: there is no such method, or methods that contradict each other.
    """

    def __init__(self, line: CommandLine, *, whole_model: bool = True) -> None:
        method, mask, update = (line.value(name) for name in ("method", "mask", "update"))
        if method and mask and update:
            raise InputError(
                "--mask and --update together say all that --method does: leave one of the three "
                "out"
            )
        self._whole_model, self._preset_name = whole_model, line.value("preset")
        self._mask, self._update = mask or method or "admm", update or method or "admm"
        self._given_mask = masks.is_stored(self._mask)
        self.classes: dict[str, type] = {"update": methods.load(self._update)}
        if not self._given_mask and self._mask != self._update:
            self.classes = {"mask": methods.load(self._mask)} | self.classes

    def sections(self) -> Iterator[Section]:
        """Yields the flags, by heading."""
        names = (
            f"Methods: {', '.join(methods.names())}; --method NAME --help shows a method's own "
            "options."
        )
        own = self._preset(self._preset_name, {}) if self._preset_name in PRESETS else {}
        yield Section("Pruning", Flags, help=names)
        if self._whole_model:
            presets = (
                f"Presets: {', '.join(PRESETS)}; --preset NAME --help shows what one sets as "
                "defaults."
            )
            yield Section("The whole model", WholeModel, help=presets)
            yield Section("Importance, by the gradients of the loss", Importance, defaults=own)
            yield Section("Tuning, towards the dense model's predictions", Tuning, defaults=own)
            yield Section("Experts", Experts)
        for role, cls in self.classes.items():
            about = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
            yield Section(
                f"Method {self._name(role)}", cls, self.flag_of(role), about, defaults=own
            )

    @staticmethod
    def elsewhere(flag: str) -> str:
        """Returns which of our methods have a flag, as a clause; "" for none."""
        field = flag.removeprefix("--").replace("-", "_")
        names = [
            name
            for name in methods.names()
            if field in {own.name for own in dataclasses.fields(methods.load(name))}
        ]
        return f"{flag} is an option of --method {' and '.join(names)}" if names else ""

    def recipe(self, given: Mapping[str, Any]) -> Recipe:
        """Returns the recipe that the values of flags make.

        Raises:
            InputError: values that cannot be used, or contradict each other.
        """
        values = {**self._preset(given.get("preset"), given), **given}
        return self._recipe(make(WholeModel, values), given, values)

    def _preset(self, name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the flags that a preset sets.

        Raises:
            InputError: there is no such preset; a tuning is left out that it has not.
        """
        if name is None:
            return {}
        if name not in PRESETS:
            raise InputError(f"--preset takes {', '.join(PRESETS)}, not {name!r}")
        preset = PRESETS[name]
        flags = {"asymmetry": preset.asymmetry} | _set(preset.importance) | _set(preset.tuning)
        if given.get("token_power"):  # needs all windows
            del flags["sensitivity_windows"]
        for one, other in (("tune_epochs", "tune_tokens"), ("tune_tokens", "tune_epochs")):
            if one in given and other in flags and other not in given:
                if not given[one]:
                    kind = one.removeprefix("tune_")
                    raise InputError(
                        f"the tuning of --preset {name} has no {kind}",
                        options={other: 0, one: Change.OMIT},
                    )
                del flags[other]
        if not any({**flags, **given}.get(name) for name in ("tune_epochs", "tune_tokens")):
            flags = {name: value for name, value in flags.items() if name not in HOW_TUNED}
        for role in self.classes:
            flag_of = self.flag_of(role)
            if isinstance(preset.method, self.classes[role]):
                flags |= {
                    flag: value
                    for field, value in _set(preset.method).items()
                    if (flag := flag_of(field))
                }
        return flags

    def _name(self, role: str) -> str:
        return self._mask if role == "mask" else self._update

    def _fields(self, role: str) -> set[str]:
        """Returns a method's options that matter in its role."""
        does = {role} if self._given_mask or len(self.classes) > 1 else {"mask", "update"}
        return {
            f.name
            for f in dataclasses.fields(self.classes[role])
            if {f.metadata.get("only", role)} & does
        }

    def flag_of(self, role: str) -> Callable[[str], str | None]:
        """Returns field -> flag of the method in a role; flags that both methods have are told
        apart by their role."""
        fields = self._fields(role)
        shared = set().union(*(self._fields(other) for other in self.classes if other != role))
        return lambda field: (
            (f"{role}_{field}" if field in shared else field) if field in fields else None
        )

    def _recipe(
        self, whole: WholeModel, given: Mapping[str, Any], values: Mapping[str, Any]
    ) -> Recipe:
        """Returns the recipe of what was given, and of all values: those and the preset's."""
        flags, importance, tuning = (
            make(Flags, values),
            make(Importance, values),
            make(Tuning, values),
        )
        _require_use(whole, given, importance, tuning)
        made = {role: make(cls, values, self.flag_of(role)) for role, cls in self.classes.items()}
        method: Method = made["update"]
        if "mask" in made:
            method = Crossed(made["mask"], method)
        if flags.finish_steps < 0:
            raise InputError(f"--finish-steps must not be negative, not {flags.finish_steps}")
        if flags.finish_steps:
            method = Finished(method, Exact(steps=flags.finish_steps))
        if self._given_mask:
            if flags.pattern is not None or flags.sparsity is not None:
                raise InputError(
                    f"--mask {self._mask} decides which weights stay: leave --pattern and "
                    "--sparsity out"
                )
            pattern, useless = None, without_effect(None)
        else:
            pattern = parse_pattern(
                flags.pattern or ("per-output" if method.per_output else "unstructured"),
                flags.sparsity,
            )
            useless = (
                {"spread": "--uniform wants one sparsity for every linear layer"}
                if whole.uniform
                else {}
            )
            useless |= without_effect(pattern)
        if asked := [name for name in useless if given.get(name)]:
            raise InputError(f"{useless[asked[0]]}: leave --{asked[0].replace('_', '-')} out")
        # what a preset sets
        importance, tuning = importance.without(useless), tuning.without(useless)
        mask = self._mask if self._given_mask else None
        rules = whole.rules(pattern)
        parts = whole.preset, whole.asymmetry, rules, make(Experts, values), whole.quantize
        return Recipe(method, pattern, mask, importance, tuning, *parts)


def _set(values: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that have other values than their defaults."""
    found = {
        field.name: (getattr(values, field.name), field.default)
        for field in dataclasses.fields(values)
    }
    return {name: value for name, (value, default) in found.items() if value != default}


def _require_use(
    whole: "WholeModel", given: Mapping[str, Any], importance: Importance, tuning: Tuning
) -> None:
    """Raises InputError for flags that only matter beside others which are not there."""
    alone = {
        "uniform": ("--preset", whole.preset is not None),
        "sensitivity_windows": ("--preset, --weigh-outputs or --spread", importance.measured),
        **dict.fromkeys(HOW_TUNED, ("--tune-epochs or --tune-tokens", tuning.tunes)),
        "tune_to_end": ("--tune-tokens", tuning.tune_tokens > 0),
    }
    for name, (needed, there) in alone.items():
        if given.get(name) and not there:
            raise InputError(
                f"--{name.replace('_', '-')} does nothing by itself: pass {needed} with it"
            )


def parse(argv: Sequence[str]) -> Recipe:
    """Returns the recipe of a command line that has no other flags.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    line = CommandLine(argv)
    chosen = RecipeOptions(line)
    return chosen.recipe(line.read("jaxprune", "", chosen.sections()))
