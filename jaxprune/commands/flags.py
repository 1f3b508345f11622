"""Command lines from dataclasses: one field = one flag, and the docstring under a field is the flag's help text."""

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxprune.errors import InputError


def add_fields(group: Any, cls: Any, flag_of: Callable[[str], str | None] | None = None) -> None:
    """Adds one flag a field. Flags left out are absent from the result, so that defaults stand in one place only.

    Args:
        group: of an argparse parser.
        cls: a dataclass.
        flag_of: field name -> the flag's name without dashes, or None: no flag. Default: the field's own name.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = flag_of(field.name) if flag_of else field.name
        if name is None:
            continue
        kind, text = hints[field.name], docs[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        elif field.default is not dataclasses.MISSING and kind is not bool:
            text += f" (default: {field.default})"
        options: dict[str, Any] = {
            "dest": name,
            "help": text.replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "required": field.default is dataclasses.MISSING,
        }
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": {int: whole, float: real, str: named}.get(kind, kind)}
            options |= {"metavar": {int: "N", float: "X"}.get(kind, "NAME")}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def make(cls: Any, given: Mapping[str, Any], flag_of: Callable[[str], str | None] | None = None) -> Any:
    """The dataclass from a parsed command line."""
    flags = {f.name: flag_of(f.name) if flag_of else f.name for f in dataclasses.fields(cls)}
    return cls(**{field: given[flag] for field, flag in flags.items() if flag is not None and flag in given})


def whole(text: str) -> int:
    """A whole number that fits 32 bits, as sizes and seeds have to.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = int(text)
    except ValueError:  # as for thousands of digits
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no whole number") from None
    if not -(2**31) <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{_brief(text)} is too large: at most {2**31 - 1} can be used")
    return value


def real(text: str) -> float:
    """A finite number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no finite number")
    return value


def named(text: str) -> str:
    """A name, which is not empty: `--out "$OUT"` without OUT is a mistake, and no wish for the default.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("nothing is given")
    return text


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
    """Field name -> the docstring under it, inherited fields included."""
    docs = {}
    for own in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(own))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), field.target.id
                docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs
