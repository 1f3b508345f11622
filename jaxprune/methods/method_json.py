"""Methods as JSON, in recipes and records."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from convert.schema import refused
from jaxprune import methods
from jaxprune.errors import InputError
from jaxprune.methods import Method, NotInstalled, Scalar
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact


def method_as_json(method: Method) -> dict[str, Any]:
    """Returns a method as JSON; `method_of_json` creates an equal method from it."""
    if isinstance(method, Crossed):
        return {
            "mask": method_as_json(method.selector),
            "update": method_as_json(method.updater),
        }
    if isinstance(method, Finished):
        finish = dataclasses.asdict(method.finish)
        return {"method": method_as_json(method.method), "finish": finish}
    options = dataclasses.asdict(method)  # type: ignore[call-overload]
    if isinstance(method, NotInstalled):
        options = dict(method.options)
    return {"name": methods.name_of(method), "options": options}


def method_of_json(value: Any) -> Method:
    """Returns the method that JSON describes, or `NotInstalled` if it cannot be created here.

    Raises:
        ValueError: the value does not describe a method.
    """
    if isinstance(value, Method):
        return value
    match value:
        case {"mask": mask, "update": update}:
            return Crossed(method_of_json(mask), method_of_json(update))
        case {"method": method, "finish": dict() as finish}:
            return Finished(method_of_json(method), _made(Exact, finish))
        case {"name": str() as name, "options": dict() as options}:
            if not all(isinstance(one, Scalar) for one in options.values()):
                raise ValueError("options that are text, numbers, true, false or null")
            try:
                return _made(methods.load(name), options)
            except InputError as error:
                return NotInstalled(name, tuple(options.items()), str(error))
    raise ValueError("a method, or one method's mask and another's update")


def text_of(method: Method) -> str:
    """Returns a method's description for people."""
    if isinstance(method, Crossed):
        return f"{text_of(method.selector)} mask, {text_of(method.updater)} update"
    if isinstance(method, Finished):
        return f"{text_of(method.method)}, {method.finish.steps} steps to finish"
    return methods.name_of(method)


StoredMethod = Annotated[
    Method, pydantic.PlainValidator(method_of_json), pydantic.PlainSerializer(method_as_json)
]
"""The type of a dataclass field that holds a method and is stored as JSON."""


def _made(cls: type, options: Mapping[str, Any]) -> Any:
    """Creates a method from options, without converting their types; raises InputError if they do
    not fit."""
    if unknown := options.keys() - {field.name for field in dataclasses.fields(cls)}:
        raise InputError(f"{cls.__name__} has no option {min(unknown)}")
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
    except pydantic.ValidationError as error:
        raise refused(error, file="", entry=cls.__name__, error=InputError) from None
