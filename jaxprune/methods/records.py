"""The JSON of methods, as recipes and records keep it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from convert.schema import Schema, refused
from jaxprune import methods
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact

MOST = 1.7e308
"""The largest number that an option may have."""


def _scalar(value: Any) -> Any:
    number = isinstance(value, int | float) and -MOST <= value <= MOST  # NaN is neither
    if number or value is None or isinstance(value, str):
        return value
    raise ValueError("text, a finite number, true, false or null")


Scalar = Annotated[Any, pydantic.AfterValidator(_scalar)]


class PlainRecord(Schema):
    """The JSON of a method with its options."""

    kind: Literal["method"]
    name: str
    options: dict[str, Scalar]

    def method(self) -> Method:
        """Returns the method; InputError where it is not installed, or has no such option."""
        return _made(methods.load(self.name), self.options)

    def __str__(self) -> str:
        return self.name


class CrossedRecord(Schema):
    """The JSON of one method's mask with another's update."""

    kind: Literal["crossed"]
    mask: "MethodRecord"
    update: "MethodRecord"

    def method(self) -> Method:
        """Returns the method; InputError as for `PlainRecord.method`."""
        return Crossed(self.mask.method(), self.update.method())

    def __str__(self) -> str:
        return f"{self.mask} mask, {self.update} update"


class FinishedRecord(Schema):
    """The JSON of a method and the options of the solver that finishes its weights."""

    kind: Literal["finished"]
    finished: "MethodRecord" = Field(alias="method")
    finish: dict[str, Scalar]

    def method(self) -> Method:
        """Returns the method; InputError as for `PlainRecord.method`."""
        return Finished(self.finished.method(), _made(Exact, self.finish))

    def __str__(self) -> str:
        return f"{self.finished}, {self.finish.get('steps')} steps to finish"


MethodRecord = Annotated[PlainRecord | CrossedRecord | FinishedRecord, Field(discriminator="kind")]


def method_as_json(method: Method) -> dict[str, Any]:
    """Returns the content of the `MethodRecord` of a method."""
    if isinstance(method, Crossed):
        return {
            "kind": "crossed",
            "mask": method_as_json(method.selector),
            "update": method_as_json(method.updater),
        }
    if isinstance(method, Finished):
        finish = dataclasses.asdict(method.finish)
        return {"kind": "finished", "method": method_as_json(method.method), "finish": finish}
    options = dataclasses.asdict(method)  # type: ignore[call-overload]
    return {"kind": "method", "name": methods.name_of(method), "options": options}


def _made(cls: type, options: Mapping[str, Any]) -> Any:
    """Returns a method with options of the types that it declares."""
    if unknown := options.keys() - {field.name for field in dataclasses.fields(cls)}:
        raise InputError(f"{cls.__name__} has no option {min(unknown)}")
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
    except pydantic.ValidationError as error:
        raise refused(error, file="", entry=cls.__name__, error=InputError) from None
