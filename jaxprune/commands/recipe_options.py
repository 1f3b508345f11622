"""The options that say how to prune, and the recipe that a command line makes of them."""

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from jaxprune import methods
from jaxprune.commands.command_line import CommandLine, Section, fields_in, real
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, NotInstalled
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.recipe import PRESETS, Recipe
from jaxprune.recipe_parts import (
    HOW_TUNED,
    Importance,
    Rule,
    Structure,
    Tuning,
    without_effect,
)
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import (
    NM,
    NO_ZEROS,
    Given,
    RecipePattern,
    Unstructured,
    parse_pattern,
)

Part = TypeVar("Part", Structure, Importance)


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags that all methods share."""

    method: str | None = None
    """The pruning method, which selects the mask and updates the weights (default: admm)."""
    mask: str | None = None
    """Select the mask with this method instead. Or use a given mask: from-checkpoint:DIR uses the
    zeros of a pruned checkpoint, from-file:FILE a file that --save-masks made."""
    update: str | None = None
    """Update the weights under the mask with this method instead; exact computes the optimum."""
    sparsity: float | None = None
    """Fraction of weights to set to zero in every linear layer (default: 0.5, but 0 with options
    that remove parts of the model; N:M patterns have their own)."""
    pattern: str | None = None
    """unstructured compares the weights of a whole matrix, per-output those of each output. N:M,
    such as 2:4, keeps N of every M consecutive inputs. Default: as the mask's method was published.
    """
    finish_steps: int = 0
    """Number of conjugate-gradient steps after the method, towards the optimum under the mask."""


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """The flags that only matter where a whole model is pruned."""

    preset: str | None = None
    """Use a tested set of options. All presets weigh outputs by the gradients of the loss, give
    every linear layer its own sparsity (except for N:M) and tune the kept weights. best tunes
    longer than fast; thorough tunes on a million tokens (see --tune-tokens). --dry-run estimates
    the time. Other options that you give override the preset's."""
    uniform: bool = False
    """Give every linear layer the same sparsity, even with a preset."""
    asymmetry: float = 0.0
    """Fraction of the activation shift that every linear layer compensates. 0 preserves a layer's
    own output on its pruned inputs, 1 targets the dense model's output. Above 0, each layer needs
    another forward pass."""
    quantize: Literal["q4_0", "q5_0"] | None = None
    """Quantize all linear layers to the grid of this GGUF type at the end, including those that
    --skip leaves dense. The remaining weights compensate each rounding error. `jaxprune convert OUT
    OUT.gguf --type q4_0` then stores them exactly. There is no q8_0, because rounding to 8 bits
    costs nothing."""
    route_all: bool = False
    """During calibration, send every token to every expert, weighted by its routing probability.
    Otherwise an expert sees only the tokens routed to it."""
    skip: tuple[str, ...] = ()
    """Leave linear layers dense, by name, such as 'layers.0.*' or '*.down_proj'. You can repeat
    this option."""
    rule: tuple[str, ...] = ()
    """Give linear layers their own pattern: NAMES=SPARSITY or NAMES=N:M, such as '*.q_proj=0.8' or
    'layers.2[0-9].*=2:4'. You can repeat this option; the last rule that names a layer applies.
    With --max-deviation, the other layers compensate, so that the total is --sparsity. If rules
    name every linear layer, only they apply."""


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
        line: the command line, of which only the names of methods and preset are looked at. Where
            it has a record, its recipe is amended.
        whole_model: whether a whole model is pruned, so that the options which need one are
            offered.

    Attributes:
        parts: role, mask or update, -> the method, before its flags are read; one that does both is
            in the role of update.

    Raises:
        InputError: there is no such method, or methods that contradict each other.
    """

    def __init__(self, line: CommandLine, *, whole_model: bool = True) -> None:
        self._whole_model, self._record = whole_model, line.record and line.record.recipe
        self._preset = line.value("preset")
        self._base = PRESETS.get(self._preset or "", self._record or Recipe())
        names = [line.value(name) for name in ("method", "mask", "update")]
        if all(names):
            raise InputError(
                "--mask and --update together say all that --method does: leave one of the three "
                "out"
            )
        self._set_parts(*names)

    def _set_parts(self, method: str | None, mask: str | None, update: str | None) -> None:
        """Chooses the methods: those that flags name, else the base's."""
        own: Method = self._base.method
        own = own.method if isinstance(own, Finished) else own
        parts, crossed = {"update": own}, isinstance(own, Crossed)
        if isinstance(own, Crossed):
            parts = {"mask": own.selector, "update": own.updater}
        self.mask = self._record.mask if self._record else None
        mask = mask or (None if self.mask else method)
        update = update or method
        if mask:
            self.mask = mask if masks.is_stored(mask) else None

        def named(role: str, name: str | None) -> Method:
            known = [parts.get(role, own), *parts.values()]
            cls: Any = methods.load(name) if name else type(known[0])
            return next((one for one in known if type(one) is cls), None) or cls()

        self.parts: dict[str, Any] = {"update": named("update", update)}
        if not self.mask:
            selector = named("mask", mask)
            if type(selector) is not type(self.parts["update"]) or (
                crossed and not (mask and update)
            ):
                self.parts = {"mask": selector} | self.parts
        for part in self.parts.values():
            if isinstance(part, NotInstalled):
                raise InputError(part.reason)

    def sections(self) -> Iterator[Section]:
        """Yields the flags, by heading."""
        names = (
            f"Methods: {', '.join(methods.names())}; --method NAME --help shows a method's own "
            "options."
        )
        base = vars(self._base.importance) | vars(self._base.tuning)
        yield Section("Pruning", Flags, help=names)
        if self._whole_model:
            presets = (
                f"Presets: {', '.join(PRESETS)}; --preset NAME --help shows what one sets as "
                "defaults."
            )
            yield Section("The whole model", WholeModel, help=presets)
            yield Section("Importance, by the gradients of the loss", Importance, defaults=base)
            yield Section("Tuning, towards the dense model's predictions", Tuning, defaults=base)
            yield Section("Structure: parts that are removed before pruning", Structure)
        for role in self._plain():
            part, flags = self.parts[role], self.flags_of(role)
            about = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
            own = {flag: getattr(part, name) for name, flag in flags.items()}
            title = f"Method {methods.name_of(part)}"
            if len({type(part) for part in self.parts.values()}) < len(self.parts):
                title += f", {role}"
            yield Section(title, type(part), flags, about, defaults=own)

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
        if self._preset and self._preset not in PRESETS:
            raise InputError(f"--preset takes {', '.join(PRESETS)}, not {self._preset!r}")
        base, method = self._record or self._base, self._method(given)
        structure = _replaced(base.structure, given)
        removes = any(given.get(f"drop_{kind}") for kind in structure.removed)
        pattern = self._pattern(given, method)
        if (
            removes
            and not self._record
            and not {"sparsity", "pattern", "mask", "rule"} & given.keys()
        ):
            pattern = NO_ZEROS
        useless = without_effect(pattern)
        if given.get("uniform"):
            useless["max_deviation"] = "--uniform wants one sparsity for every linear layer"
        if asked := [name for name in useless if given.get(name)]:
            raise InputError(f"{useless[asked[0]]}: leave --{asked[0].replace('_', '-')} out")
        importance = _amended_importance(self._base.importance, given, useless)
        tuning = _amended_tuning(self._base.tuning.without(useless), given, self._preset)
        _require_use(given, self._base.preset, importance, tuning)
        return Recipe(
            method,
            pattern,
            importance,
            tuning,
            self._base.preset,
            given.get("asymmetry", self._base.asymmetry),
            _amended_rules(base.rules, given, pattern),
            structure,
            given.get("route_all", base.route_all),
            given.get("quantize", base.quantize),
        )

    def _plain(self) -> list[str]:
        """Returns the roles whose methods have flags: those that are not made of others."""
        return [
            role for role, part in self.parts.items() if not isinstance(part, Crossed | Finished)
        ]

    def _fields(self, role: str) -> set[str]:
        """Returns a method's options that matter in its role."""
        does = {role} if self.mask or len(self.parts) > 1 else {"mask", "update"}
        return {
            f.name
            for f in dataclasses.fields(self.parts[role])
            if {f.metadata.get("only", role)} & does
        }

    def flags_of(self, role: str) -> dict[str, str]:
        """Returns field -> flag of the method in a role; a flag that both methods have
        begins with the role."""
        shared = set().union(*(self._fields(other) for other in self._plain() if other != role))
        return {name: f"{role}_{name}" if name in shared else name for name in self._fields(role)}

    def _method(self, given: Mapping[str, Any]) -> Method:
        parts = dict(self.parts)
        for role in self._plain():
            part, flags = parts[role], self.flags_of(role)
            values = {name: given.get(flag, getattr(part, name)) for name, flag in flags.items()}
            parts[role] = type(part)(**values)
        method: Method = parts["update"]
        if "mask" in parts:
            method = Crossed(parts["mask"], method)
        steps, own = given.get("finish_steps"), self._base.method
        if steps is not None and steps < 0:
            raise InputError(f"--finish-steps must not be negative, not {steps}")
        if steps is None and isinstance(own, Finished):
            return Finished(method, own.finish)
        if steps:
            finish = own.finish if isinstance(own, Finished) else Exact()
            return Finished(method, dataclasses.replace(finish, steps=steps))
        return method

    def _pattern(self, given: Mapping[str, Any], method: Method) -> RecipePattern:
        kind, sparsity = given.get("pattern"), given.get("sparsity")
        if self.mask:
            if kind is not None or sparsity is not None:
                raise InputError(
                    f"--mask {self.mask} decides which weights stay: leave --pattern and "
                    "--sparsity out"
                )
            return Given(self.mask)
        usual = "per-output" if method.per_output else "unstructured"
        base = self._record.pattern if self._record else None
        if isinstance(base, Given | None):
            return parse_pattern(kind or usual, sparsity)
        if isinstance(base, NM):
            if kind is None and (sparsity is None or abs(sparsity - base.sparsity) <= 1e-6):
                return base
            return parse_pattern(kind or usual, sparsity)
        if kind is None:
            return base if sparsity is None else dataclasses.replace(base, sparsity=sparsity)
        return parse_pattern(
            kind, base.sparsity if sparsity is None and ":" not in kind else sparsity
        )


def _replaced(part: Part, given: Mapping[str, Any]) -> Part:
    """Returns a dataclass with the fields that flags of their names give."""
    return dataclasses.replace(part, **fields_in(given, part))


def _amended_importance(
    base: Importance, given: Mapping[str, Any], useless: Collection[str]
) -> Importance:
    """Returns the base's importance with the fields that flags give, without what changes nothing
    then."""
    if given.get("token_power"):  # needs all windows
        base = dataclasses.replace(base, sensitivity_windows=None)
    found = _replaced(base, given).without(useless)
    if "sensitivity_windows" in given:  # which alone is an error
        found = dataclasses.replace(found, sensitivity_windows=given["sensitivity_windows"])
    return found


def _amended_tuning(base: Tuning, given: Mapping[str, Any], preset: str | None) -> Tuning:
    """Returns the base's tuning with the fields that flags give: epochs take the place of tokens,
    and tokens of epochs.

    Raises:
        InputError: a flag wants no epochs where there are tokens, or the reverse.
    """
    values = vars(base) | fields_in(given, base)
    for one, other in (("tune_epochs", "tune_tokens"), ("tune_tokens", "tune_epochs")):
        if one in given and other not in given and getattr(base, other):
            if not given[one]:
                kind = one.removeprefix("tune_")
                of = f" of --preset {preset}" if preset else ""
                raise InputError(
                    f"the tuning{of} has no {kind}", options={other: 0, one: Change.OMIT}
                )
            values[other] = 0
    useless = [] if values["tune_tokens"] else ["tune_to_end"]
    if not (values["tune_epochs"] or values["tune_tokens"]):
        useless += HOW_TUNED
    unset = {f.name: f.default for f in dataclasses.fields(Tuning) if f.name in useless}
    return Tuning(**values | {name: given.get(name, value) for name, value in unset.items()})


def _amended_rules(
    base: Sequence[Rule], given: Mapping[str, Any], pattern: RecipePattern
) -> tuple[Rule, ...]:
    """Returns the base's rules with those that flags give in place of their like; skipped linear
    layers stay dense whatever else names them.

    Raises:
        InputError: a rule has no pattern.
    """
    per_output = isinstance(pattern, Unstructured) and pattern.per_output
    own = [] if isinstance(pattern, Given) else [rule for rule in base if rule.pattern]
    dense = [rule for rule in base if not rule.pattern]
    if not {"rule", "skip"} & given.keys():
        return tuple(rule for rule in base if rule in own or rule in dense)
    if "rule" in given:
        own = [_rule(text, per_output) for text in given["rule"]]
    if "skip" in given:
        dense = [Rule(names) for names in given["skip"]]
    return (*own, *dense)


def _require_use(
    given: Mapping[str, Any], preset: str | None, importance: Importance, tuning: Tuning
) -> None:
    """Raises InputError for flags that only matter beside others which are not there."""
    alone = {
        "uniform": ("--preset", preset is not None),
        "sensitivity_windows": (
            "--preset, --weigh-outputs or --max-deviation",
            importance.measured,
        ),
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
    return chosen.recipe(line.read(*chosen.sections()))
