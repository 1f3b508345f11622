"""Command lines by cyclopts: one field of a dataclass = one flag, and the docstring under it is the
flag's help text.

All of cyclopts, tyro and jsonargparse read dataclasses. We use cyclopts for three reasons. Its
errors are data, which we print on one line. It omits flags that were not given, which may come from
a preset. Its help is grouped.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, UnknownOptionError
from cyclopts.config import Dict
from docstring_parser import parse_from_object

from convert.files import expand
from jaxprune.commands import config_file
from jaxprune.commands.terminal import console
from jaxprune.errors import InputError, UserError

CHECKPOINT = "A folder, a .gguf file, a known name such as llama-7b, or owner/name on the hub."
"""Help of a positional argument that names a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Some flags of a command line, under one heading of its help.

    Attributes:
        title: the heading.
        options: a dataclass.
        flags: field -> its flag's name without dashes, in Python's spelling; other fields have no
            flag. None: the fields' own names.
        help: below the heading.
        defaults: of flags, where they are not their fields'.
    """

    title: str
    options: type
    flags: Mapping[str, str] | None = None
    help: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class CommandLine:
    """A command line, and the options of the file that its --config names.

    Args:
        argv: the words.
        module: the name of the command's module, for its help.
        repeats: whether the file may be the record of a run.

    Attributes:
        record: that record; None: there is none.

    Raises:
        InputError: the file holds no options.
        CheckpointError: it cannot be read.
    """

    def __init__(self, argv: Sequence[str], module: str = "", *, repeats: bool = False) -> None:
        self._argv = list(argv)
        self._module = sys.modules.get(module)
        self._command = f"jaxprune {module.rpartition('.')[2]}"
        self._given: dict[str, str] = {}
        for word, following in itertools.zip_longest(self._argv, self._argv[1:], fillvalue=""):
            if word.startswith("--"):
                flag, equals, value = word[2:].partition("=")
                self._given[flag.replace("-", "_")] = value if equals else following
        self._file = expand(name) if (name := self._given.get("config")) else None
        found = config_file.load(self._file, repeats=repeats) if self._file else {}
        self._stored = found if isinstance(found, dict) else {}
        self.record = None if isinstance(found, dict) else found

    @property
    def repeated(self) -> Mapping[str, Any]:
        """The options of the record's run, by name; empty without a record."""
        return self.record.config.model_dump() if self.record else {}

    def value(self, flag: str) -> str | None:
        """Returns a flag's value without parsing the others; None if it is not given."""
        stored = self._stored.get(flag)
        return self._given.get(flag, None if stored is None else str(stored))

    def read(
        self,
        *sections: Section,
        positionals: Mapping[str, str] = MappingProxyType({}),
        several: bool = False,
        elsewhere: Callable[[str], str] = lambda flag: "",
    ) -> dict[str, Any]:
        """Parses the command line.

        Args:
            sections: its flags.
            positionals: name -> help text of each positional argument.
            several: whether the last positional argument can be repeated.
            elsewhere: an unknown flag -> the command that has it; "" if none has.

        Returns:
            Flag's name, in Python's spelling, -> value, of only the flags that were given.

        Raises:
            UserError: a flag or a value that cannot be used, or two flags have one name.
            SystemExit: after --help.
        """

        def collect(*args: Any, **kwargs: Any) -> None:
            del args, kwargs

        words = [
            _positional(name, text, several and name == [*positionals][-1])
            for name, text in positionals.items()
        ]
        flags = _flags(self._command, positionals, [*sections, Section("Options", ConfigFile)])
        collect.__signature__ = inspect.Signature([*words, *flags])  # type: ignore[attr-defined]
        collect.__doc__ = getattr(self._module, "__doc__", None)
        app = App(
            name=self._command,
            help_flags=[],
            version_flags=[],
            help_epilogue=getattr(self._module, "EXAMPLES", ""),
            help_format="plaintext",
            console=console,
            end_of_options_delimiter="",
            config=Dict(self._stored, source=str(self._file), use_commands_as_keys=False),
        )
        app.default(collect)
        if {"-h", "--help"} & set(self._argv):
            app.help_print()
            raise SystemExit(0)
        try:
            _, bound, _ = app.parse_args(self._argv, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            text = self._with_hint(_said(error, elsewhere))
            raise UserError(text, file=self._file if _is_stored(error) else None) from None
        found = dict(zip(positionals, bound.args, strict=False))
        if several:
            *_, name = positionals
            found[name] = list(bound.args[len(positionals) - 1 :])
            if not found[name]:
                raise UserError(self._with_hint(f"{name.upper()} is missing"))
        return found | bound.kwargs

    def _with_hint(self, problem: str) -> str:
        return f"{problem} ({self._command} --help lists the options)"


def _said(error: CycloptsError, elsewhere: Callable[[str], str]) -> str:
    """Returns an error of cyclopts on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UnknownOptionError):
        return elsewhere((error.token.keyword or error.token.value or "").partition("=")[0]) or text
    if isinstance(error, MissingArgumentError) and error.argument and error.keyword is None:
        return f"{error.argument.name} is missing"
    return text


def _is_stored(error: CycloptsError) -> bool:
    """Returns whether an error is about what a file of options says."""
    tokens = [getattr(error, "token", None), *(error.argument.tokens if error.argument else [])]
    return any(token and token.source != "cli" for token in tokens)


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The flag that all commands have."""

    config: str | None = None
    """A .yaml or .json file with options, named like the flags. Flags on the command line override
    it. prune, plan and snapshot also take the jaxprune.json of a run, to repeat the run."""


def _positional(name: str, text: str, several: bool) -> inspect.Parameter:
    kind = inspect.Parameter.VAR_POSITIONAL if several else inspect.Parameter.POSITIONAL_ONLY
    note = Parameter(name=name.upper(), help=text, converter=_convert(named), show_default=False)
    return inspect.Parameter(name, kind, annotation=Annotated[str, note])


def _flags(
    command: str, positionals: Iterable[str], sections: Sequence[Section]
) -> Iterator[inspect.Parameter]:
    """Yields the flags of all sections.

    Args:
        command: the name of the command, such as `jaxprune plan`.
        positionals: the names of what comes without a flag.
        sections: the flags.

    Raises:
        InputError: two flags have one name. Only a method of another package can cause it: a test
            reads the flags of each command with each of our methods.
    """
    titles = dict.fromkeys(["help", *positionals], command)
    for number, section in enumerate(sections, 1):
        group = Group(section.title, help=section.help, sort_key=number)
        for field in dataclasses.fields(section.options):
            flag = field.name if section.flags is None else section.flags.get(field.name)
            if flag:
                if flag in titles:
                    both = f"one of {titles[flag]!r} and one of {section.title!r}"
                    raise InputError(
                        f"two flags of {command} have the name --{flag.replace('_', '-')}, {both}: "
                        "rename the option of the method"
                    )
                titles[flag] = section.title
                yield _parameter(section, field, flag, group)


def _parameter(
    section: Section, field: dataclasses.Field, flag: str, group: Group
) -> inspect.Parameter:
    kind = typing.get_type_hints(section.options)[field.name]
    text = field_docs(section.options)[field.name]
    default = section.defaults.get(flag, field.default)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        kind = functools.reduce(operator.or_, kinds)
    if default not in (dataclasses.MISSING, (), None) and default is not False:
        text += f" (default: {default})"
    converter = CONVERTERS.get(kind)
    spelt = flag.replace("_", "-")
    note = Parameter(
        name=f"--{spelt}",
        help=text,
        group=group,
        negative=f"--no-{spelt}" if default is True else "",
        show_default=False,
        converter=_convert(converter) if converter else None,
        allow_leading_hyphen=kind in (int, float, int | str),
    )
    required = default is dataclasses.MISSING
    return inspect.Parameter(
        flag,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, note],
    )


def _convert(function: Callable[[str], Any]) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda kind, tokens: function(tokens[0].value)


def make(cls: Any, given: Mapping[str, Any]) -> Any:
    """Makes a dataclass of what `read` returned."""
    return cls(**fields_in(given, cls))


def fields_in(given: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """Returns what is given for the fields of a dataclass."""
    return {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}


def whole(text: str) -> int:
    """Reads a whole number that fits 32 bits, as sizes and seeds have to; k after it are
    thousands, M millions.

    Raises:
        ValueError: it is none.
    """
    unit = {"k": 1000, "M": 1_000_000}.get(text[-1:], 1)
    try:
        value = int(text[:-1] if unit > 1 else text) * unit
    except ValueError:  # as for thousands of digits
        raise ValueError(f"{_brief(text)} is no whole number, such as 16, 250k or 1M") from None
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{_brief(text)} is too large: at most {2**31 - 1} can be used")
    return value


def real(text: str) -> float:
    """Reads a finite number.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{_brief(text)} is no finite number")
    return value


def named(text: str) -> str:
    """Reads a name, which is not empty: `--out "$OUT"` without OUT is a mistake, and no wish for
    the default.

    Raises:
        ValueError: it is empty.
    """
    if not text:
        raise ValueError("nothing is given")
    return text


def whole_or_text(text: str) -> int | str:
    """Reads a whole number, or any other text, which is not empty; errors as for `whole` and
    `named`."""
    return whole(text) if re.fullmatch("[-+]?[0-9]+", text) else named(text)


CONVERTERS: Mapping[Any, Callable[[str], Any]] = {
    int: whole,
    float: real,
    str: named,
    int | str: whole_or_text,
}
"""Type of an option -> how its text is read."""


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text)} characters)"


def require_positive(options: Any, *names: str) -> None:
    """Raises InputError where an option that counts something is below one; None is none given."""
    require_at_least(options, 1, *names)


def require_at_least(options: Any, least: int, *names: str) -> None:
    """Raises InputError where an option is below the least that it can be; None is none given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Returns field name -> the docstring under it, inherited fields included."""
    docs = {}
    for own in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        for field in parse_from_object(own).params:
            docs[field.arg_name] = " ".join((field.description or "").split())
    return docs
