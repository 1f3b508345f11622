"""How each linear is pruned: a mask's source, a weight update, a pattern; what all command lines have in common."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pydantic

from convert.command import ArgumentParser
from convert.schema import refused
from jaxprune import methods
from jaxprune.commands.flags import add_fields, make
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.pruning.distillation import Tuning
from jaxprune.pruning.sensitivity import Importance
from jaxprune.reporting import schema
from jaxprune.sparsity import masks, patterns
from jaxprune.sparsity.patterns import NM, Pattern, Unstructured

_FAST = {"weigh_outputs": True, "spread": 0.3, "sensitivity_windows": 8, "tune_epochs": 0.3125}
PRESETS: Mapping[str, Mapping[str, Any]] = {"fast": _FAST, "best": {**_FAST, "tune_epochs": 2.0}}
"""What a preset sets; options given beside it win."""
PRESET_OPTIONS: Mapping[str, Mapping[str, Any]] = {"admm": {"damping": 0.03}}
"""What all presets set of a method's own options."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags that all methods share."""

    method: str | None = None
    """How to prune: selects the mask and updates the weights (default: admm)."""
    mask: str | None = None
    """Select the mask with another method; or take one made elsewhere, from-checkpoint:DIR (the zeros of a pruned
    checkpoint) or from-file:FILE (made by --save-masks)."""
    update: str | None = None
    """Update the dense weights under the mask with another method; exact solves for the optimum."""
    sparsity: float | None = None
    """Fraction of weights to set to zero in every linear (default: 0.5; N:M patterns have their own)."""
    pattern: str | None = None
    """unstructured (the smallest of a whole matrix go), per-output (of each output), or N:M, such as 2:4 (N of
    every M consecutive inputs stay). Default: as the mask's method was published."""
    finish_steps: int = 0
    """Bring the weights nearer to the optimum under the mask by so many conjugate-gradient steps at the end."""


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """The flags that only matter where a whole model is pruned."""

    preset: Literal["fast", "best"] | None = None
    """Options that serve most: both weigh outputs by the loss's gradients, give every linear a sparsity of its own and
    tune the kept weights; best tunes them for longer. Options given beside it win."""
    uniform: bool = False
    """The same sparsity for every linear, whatever the preset says."""
    asymmetry: float = 0.0
    """Let every linear make up for this share of what its inputs lost in the layers before: 0 keeps the linear's own
    output on its pruned inputs, 1 aims at the dense model's. Takes another forward pass."""

    def __post_init__(self) -> None:
        if not 0 <= self.asymmetry <= 1:
            raise InputError(f"--asymmetry must lie between 0 and 1, not {self.asymmetry}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to each linear.

    Attributes:
        method: selects and updates, or only updates where the mask is given.
        pattern: None: the mask is given.
        mask: name of the given mask, as --mask has it, or None.
        importance: what is weighed by the loss's gradients.
        tuning: what is done when all linears are pruned.
        asymmetry: see `pipeline.prune`.
        preset: the name of the preset, or None.
    """

    method: Method
    pattern: Pattern | None
    mask: str | None = None
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    preset: str | None = None
    asymmetry: float = 0.0

    def patterns(self) -> Pattern | masks.Masks:
        """What `pipeline.prune` takes as its pattern.

        Raises:
            InputError, CheckpointError: the given mask cannot be read.
        """
        if self.pattern is not None:
            return self.pattern
        assert self.mask is not None
        return masks.stored(self.mask)

    def as_json(self) -> dict[str, Any]:
        """All of it, as records and journals keep it; see `schema.Recipe`."""
        pattern = {"kind": "given", "mask": self.mask} if self.pattern is None else self.pattern.as_json()
        return {
            "method": _method_as_json(self.method),
            "pattern": pattern,
            "preset": self.preset,
            "asymmetry": self.asymmetry,
            "importance": dataclasses.asdict(self.importance),
            "tuning": dataclasses.asdict(self.tuning),
        }

    @classmethod
    def from_json(cls, value: schema.Recipe) -> "Recipe":
        """The recipe whose `as_json` this is.

        Raises:
            InputError: a method or one of its options is not there, or has another type or range.
        """
        given = value.pattern.mask if isinstance(value.pattern, schema.Given) else None
        return cls(
            _method_from_json(value.method),
            patterns.from_json(value.pattern),
            given,
            Importance(**value.importance.model_dump()),
            Tuning(**value.tuning.model_dump()),
            value.preset,
            value.asymmetry,
        )

    @property
    def target(self) -> str:
        """The pattern or the mask's source, in words."""
        return schema.Recipe(**self.as_json()).target

    @property
    def name(self) -> str:
        """The method and what is done beside it, in words."""
        return schema.Recipe(**self.as_json()).how

    @property
    def slug(self) -> str:
        """A short name for files, such as wanda-admm-50; different sparsities have different ones."""
        method = self.method.method if isinstance(self.method, Finished) else self.method
        crossed = [method.selector, method.updater] if isinstance(method, Crossed) else [method]
        how = "-".join(map(_name, crossed))
        if self.pattern is None:
            return f"{how}-given-mask"
        if self.preset:
            uniform = self.pattern == Unstructured(self.pattern.sparsity) and not self.importance.spread
            how = self.preset + "-uniform" * uniform
        if isinstance(self.pattern, NM):
            return f"{how}-{self.pattern.n}of{self.pattern.m}"
        return f"{how}-{schema.percent(self.pattern.sparsity)}"


class Parser:
    """Reads the recipe of a command line, and other options with it.

    The methods that it names decide which flags there are, so it is read twice: first for their names.

    Args:
        argv: the command line.
        whole_model: whether a whole model is pruned, so that the options which need one are offered.
        given: options of `convert.command.ArgumentParser`.

    Raises:
        InputError: there is no such method, or methods that contradict each other.
    """

    def __init__(self, argv: Sequence[str], *, whole_model: bool = True, **given: Any) -> None:
        first = ArgumentParser(add_help=False)
        for flag in ("--method", "--mask", "--update"):
            first.add_argument(flag)
        known, _ = first.parse_known_args(argv)
        if known.method and known.mask and known.update:
            raise InputError("--mask and --update together say all that --method does: leave one of the three out")
        self._argv, self._whole_model = argv, whole_model
        self._mask = known.mask or known.method or "admm"
        self._update = known.update or known.method or "admm"
        self._given_mask = masks.is_stored(self._mask)
        self._classes = {"update": methods.load(self._update)}
        if not self._given_mask and self._mask != self._update:
            self._classes = {"mask": methods.load(self._mask)} | self._classes
        self.parser = ArgumentParser(**given)
        self.parser.epilog = (
            f"{self.parser.epilog or ''} Methods: {', '.join(methods.names())}; --method NAME --help shows a method's "
            "own options."
        ).strip()

    def parse(self) -> tuple[Mapping[str, Any], Recipe]:
        """The values of all flags, and the recipe they make.

        Raises:
            UserError: a flag or a value that cannot be used.
        """
        recipe = self.parser.add_argument_group("recipe")
        classes: tuple[type, ...] = (Flags, WholeModel, Importance, Tuning) if self._whole_model else (Flags,)
        for cls in classes:
            add_fields(recipe, cls)
        for role, cls in self._classes.items():
            group = self.parser.add_argument_group(f"method {self._name(role)}", inspect.getdoc(cls))
            add_fields(group, cls, self._flag_of(role))
        given = vars(self.parser.parse_args(self._argv))
        values = {**self._preset(given.get("preset"), given), **given}
        return given, self._recipe(make(WholeModel, values), given, values)

    def _preset(self, name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """The flags that a preset sets."""
        if name is None:
            return {}
        flags = dict(PRESETS[name])
        if given.get("token_power"):  # needs all windows
            del flags["sensitivity_windows"]
        for role in self._classes:
            flag_of = self._flag_of(role)
            for field, value in PRESET_OPTIONS.get(self._name(role), {}).items():
                if flag := flag_of(field):
                    flags[flag] = value
        return flags

    def _name(self, role: str) -> str:
        return self._mask if role == "mask" else self._update

    def _fields(self, role: str) -> set[str]:
        """A method's options that matter in its role."""
        does = {role} if self._given_mask or len(self._classes) > 1 else {"mask", "update"}
        return {f.name for f in dataclasses.fields(self._classes[role]) if {f.metadata.get("only", role)} & does}

    def _flag_of(self, role: str) -> Callable[[str], str | None]:
        """Options that both methods have are told apart by their role."""
        fields = self._fields(role)
        shared = set().union(*(self._fields(other) for other in self._classes if other != role))
        return lambda field: (f"{role}_{field}" if field in shared else field) if field in fields else None

    def _recipe(self, whole: WholeModel, given: Mapping[str, Any], values: Mapping[str, Any]) -> Recipe:
        """The recipe of what was given, and of all values: those and the preset's."""
        flags, importance, tuning = make(Flags, values), make(Importance, values), make(Tuning, values)
        _require_use(whole, given, importance, tuning)
        made = {role: make(cls, values, self._flag_of(role)) for role, cls in self._classes.items()}
        method: Method = made["update"]
        if "mask" in made:
            method = Crossed(made["mask"], method)
        if flags.finish_steps < 0:
            raise InputError(f"--finish-steps must not be negative, not {flags.finish_steps}")
        if flags.finish_steps:
            method = Finished(method, Exact(steps=flags.finish_steps))
        if self._given_mask:
            if flags.pattern is not None or flags.sparsity is not None:
                raise InputError(f"--mask {self._mask} decides which weights stay: leave --pattern and --sparsity out")
            why = f"--mask {self._mask} decides which weights stay"
            importance = _without(importance, given, {"spread": why, "weigh_outputs": why})
            return Recipe(method, None, self._mask, importance, tuning, whole.preset, whole.asymmetry)
        pattern = patterns.parse(
            flags.pattern or ("per-output" if method.per_output else "unstructured"), flags.sparsity
        )
        useless = {"spread": "--uniform wants one sparsity for every linear"} if whole.uniform else {}
        if isinstance(pattern, NM):
            useless = {"spread": f"pattern {pattern} is the same for every linear"}
        elif isinstance(pattern, Unstructured) and pattern.per_output:
            useless = dict.fromkeys(("spread", "weigh_outputs"), "per-output patterns compare within each output only")
        importance = _without(importance, given, useless)
        return Recipe(method, pattern, None, importance, tuning, whole.preset, whole.asymmetry)


def _without(importance: Importance, given: Mapping[str, Any], useless: Mapping[str, str]) -> Importance:
    """Drops what a preset sets where it changes nothing.

    Args:
        importance: with the preset's values.
        given: the flags that the user gave.
        useless: field -> why it changes nothing.

    Raises:
        InputError: the user gave one of them.
    """
    if asked := [name for name in useless if given.get(name)]:
        raise InputError(f"{useless[asked[0]]}: leave --{asked[0].replace('_', '-')} out")
    importance = dataclasses.replace(importance, **{name: type(getattr(importance, name))() for name in useless})
    return importance if importance.measured else Importance()


def _require_use(whole: "WholeModel", given: Mapping[str, Any], importance: Importance, tuning: Tuning) -> None:
    """Raises InputError for flags that only matter beside others which are not there."""
    alone = {
        "uniform": ("--preset", whole.preset is not None),
        "sensitivity_windows": ("--preset, --weigh-outputs or --spread", importance.measured),
        "tune_rate": ("--tune-epochs", tuning.tune_epochs > 0),
        "tune_windows": ("--tune-epochs", tuning.tune_epochs > 0),
    }
    for name, (needed, there) in alone.items():
        if given.get(name) and not there:
            raise InputError(f"--{name.replace('_', '-')} does nothing by itself: pass {needed} with it")


def parse(argv: Sequence[str]) -> Recipe:
    """The recipe of a command line that has no other flags.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    return Parser(argv).parse()[1]


def _name(method: Method) -> str:
    """A method's name on the command line: its file's."""
    return type(method).__module__.rpartition(".")[2]


def _method_as_json(method: Method) -> dict[str, Any]:
    if isinstance(method, Crossed):
        return {
            "kind": "crossed",
            "mask": _method_as_json(method.selector),
            "update": _method_as_json(method.updater),
        }
    if isinstance(method, Finished):
        finish = dataclasses.asdict(method.finish)
        return {"kind": "finished", "method": _method_as_json(method.method), "finish": finish}
    options = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {"kind": "method", "name": _name(method), "options": options}


def _method_from_json(value: schema.Plain | schema.Crossed | schema.Finished) -> Method:
    if isinstance(value, schema.Crossed):
        return Crossed(_method_from_json(value.mask), _method_from_json(value.update))
    if isinstance(value, schema.Finished):
        return Finished(_method_from_json(value.method), _made(Exact, value.finish))
    return _made(methods.load(value.name), value.options)


def _made(cls: type, options: Mapping[str, Any]) -> Any:
    """A method with options of the types that it declares."""
    if unknown := options.keys() - {field.name for field in dataclasses.fields(cls)}:
        raise InputError(f"{cls.__name__} has no option {min(unknown)}")
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
    except pydantic.ValidationError as error:
        raise refused(error, file="", entry=cls.__name__, error=InputError) from None
