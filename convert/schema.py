"""One schema for each file that comes from elsewhere: what `parse` returns has the types and ranges
that it declares.

Schemas are pydantic models, for files of others, or plain dataclasses, for our own data. pydantic's
errors name the place, what was found and what was wanted as data; its parser refuses NaN, bounds
depth, and is the one that most Python projects have already.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic_core

from convert.errors import MISSING, DamagedError, UserError
from convert.files import read_bytes

_CHOICE = r"(constrained-\w+|list\[.*\]|dict\[.*\]|is-\w+)$"
"""What pydantic calls the alternatives of a type, among an entry's steps."""


class Schema(pydantic.BaseModel):
    """A JSON object. Types are exact (no "3" for 3), numbers finite, unknown entries passed
    over."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False
    )


S = TypeVar("S")
OWN = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For `__pydantic_config__` of dataclasses that decide something: an unknown entry is an error."""
Count = Annotated[int, pydantic.Field(ge=0, le=2**53)]
"""A number of things, exact as a float too."""
Measured = Annotated[
    float,
    pydantic.BeforeValidator(lambda value: math.nan if value is None else value),
    pydantic.PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""A number that need not be finite: null in JSON, and NaN where it is read."""
FiniteOrNull = Annotated[
    float | None,
    pydantic.PlainSerializer(
        lambda value: value if value is not None and math.isfinite(value) else None
    ),
]
"""A number that need not be known: null in JSON where it is not, or is not finite."""


@functools.cache
def _adapter(schema: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(schema)


def dump(value: Any, *, defaults: bool = True) -> Any:
    """Returns JSON of a dataclass, from which `check` makes an equal one.

    Args:
        value: the dataclass.
        defaults: whether to keep the fields that have their default.
    """
    adapter = _adapter(type(value))  # type: ignore[arg-type]
    return adapter.dump_python(value, mode="json", by_alias=True, exclude_defaults=not defaults)


def read(schema: type[S], path: Path, *, error: type[UserError] = DamagedError) -> S:
    """Returns a JSON file as its schema has it.

    Args:
        schema: what it has to be.
        path: the path of the file.
        error: the class to raise where the content is not what it has to be.

    Raises:
        UserError: it cannot be read, is no JSON, or is not what the schema says; entry, found and
            wanted say where.
    """
    return parse(schema, read_bytes(path), file=path, error=error)


def read_object(path: Path, most: int) -> dict[str, Any]:
    """Returns a JSON file that is an object; see `read` and `decode`."""
    return decode(read_bytes(path, most), file=path)


def decode(
    content: str | bytes, *, file: str | Path, error: type[UserError] = DamagedError
) -> dict[str, Any]:
    """Returns a JSON object of bounded depth, whose numbers are finite; for files whose entries are
    checked one at a time."""
    try:
        value = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as problem:
        raise error(f"it is not valid JSON ({str(problem)[:200]})", file=file) from None
    if not isinstance(value, dict):
        raise error("it is no JSON object", file=file, found=value)
    if not _finite(value):
        raise error("it is not valid JSON (a number is infinite)", file=file)
    return value


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def parse(
    schema: type[S],
    content: str | bytes,
    *,
    file: str | Path,
    entry: str = "",
    error: type[UserError] = DamagedError,
) -> S:
    """Returns JSON text as its schema has it; errors as for `read`."""
    if not (isinstance(schema, type) and issubclass(schema, pydantic.BaseModel)):
        decode(content, file=file, error=error)  # a model looks at each number itself
    try:
        adapter = _adapter(schema)  # type: ignore[arg-type]
        return adapter.validate_json(content, strict=True)
    except pydantic.ValidationError as problem:
        raise refused(problem, file=file, entry=entry, error=error) from None


def check(
    schema: type[S],
    value: Any,
    *,
    file: str | Path,
    entry: str = "",
    error: type[UserError] = DamagedError,
) -> S:
    """Returns a decoded value as its schema has it; errors as for `read`."""
    try:
        if isinstance(schema, type) and issubclass(schema, pydantic.BaseModel):
            return schema.model_validate(value)
        return parse(schema, json.dumps(value), file=file, entry=entry, error=error)
    except (pydantic.ValidationError, RecursionError) as problem:
        if isinstance(problem, RecursionError):
            raise error("it is nested too deeply", file=file, entry=entry) from None
        raise refused(problem, file=file, entry=entry, error=error) from None


def refused(
    problem: pydantic.ValidationError,
    *,
    file: str | Path,
    entry: str = "",
    error: type[UserError] = DamagedError,
) -> UserError:
    """Returns the first of pydantic's errors as one of ours."""
    first = problem.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"] if not re.match(_CHOICE, str(step))]
    place = ".".join([entry, *steps] if entry else steps)
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        return error(f"it is not valid JSON ({reason})", file=file, entry=place)
    if first["type"] in ("missing", "missing_argument"):
        return error("an entry is missing", file=file, entry=place)
    if first["type"] == "union_tag_invalid":
        return error("an entry cannot be used", file=file, entry=place, found=first["input"])
    if first["type"] == "unexpected_keyword_argument":
        return error("there is no such entry", file=file, entry=place)
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):  # of a dataclass
        return error(cause.problem, file=file, entry=place)
    more = f" ({problem.error_count()} entries are)" if problem.error_count() > 1 else ""
    # of no use to show all of it
    whole = first["type"] == "value_error" and isinstance(first["input"], dict)
    found = MISSING if whole else first["input"]
    return error(
        f"an entry cannot be used{more}",
        file=file,
        entry=place,
        found=found,
        wanted=_lower(first["msg"]),
    )


def _lower(text: str) -> str:
    text = text.removeprefix("Value error, ").removeprefix("Input should be ")
    return text[:1].lower() + text[1:]


def to_text(value: Any) -> str:
    """Returns JSON text for any parser: what is not finite is null, and what is no text (a file's
    name) is escaped."""
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Returns the same JSON with null for what is not finite, and escapes for what is no text."""
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_text(name: str) -> str:
    """Returns a name that UTF-8 can hold; a file's may have bytes that are none."""
    return name.encode("utf-8", "backslashreplace").decode()
