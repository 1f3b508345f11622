"""Rows of lm-eval's tasks in files of the user's: one schema a task, with the entries that its
prompts read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from convert.schema import Schema
from jaxprune.calibration.text_files import read_rows
from jaxprune.errors import InputError

Text = Annotated[str, pydantic.Field(min_length=1)]
Binary = Annotated[int, pydantic.Field(ge=0, le=1)]


class BoolQ(Schema):
    passage: Text
    question: Text
    label: Binary


class RTE(Schema):
    sentence1: Text
    sentence2: Text
    label: Binary


class HellaSwag(Schema):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[Text], pydantic.Field(min_length=2)]
    label: int | str

    @pydantic.field_validator("label")
    @classmethod
    def _is_an_ending(cls, label: int | str, info: Any) -> int | str:
        return _among(
            label, [str(number) for number in range(len(info.data.get("endings", ())))], str(label)
        )


class WinoGrande(Schema):
    sentence: Annotated[str, pydantic.Field(pattern="_")]
    option1: Text
    option2: Text
    answer: Literal["1", "2"]


class Choices(Schema):
    text: Annotated[list[Text], pydantic.Field(min_length=2)]
    label: list[Text]

    @pydantic.field_validator("label")
    @classmethod
    def _one_a_text(cls, label: list[str], info: Any) -> list[str]:
        if len(label) != len(info.data.get("text", label)):
            raise ValueError(f"as many labels as texts, {len(info.data['text'])}")
        return label


class MultipleChoice(Schema):
    choices: Choices
    answerKey: str

    @pydantic.field_validator("answerKey")
    @classmethod
    def _is_a_label(cls, key: str, info: Any) -> str:
        return (
            _among(key, info.data["choices"].label, key.lstrip()) if "choices" in info.data else key
        )


class ARC(MultipleChoice):
    question: Text


class OpenBookQA(MultipleChoice):
    question_stem: Text


class AnyRow(Schema):
    """A row of a task that has no schema here: an object."""


SCHEMAS: Mapping[str, type[Schema]] = {
    "boolq": BoolQ,
    "rte": RTE,
    "hellaswag": HellaSwag,
    "winogrande": WinoGrande,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": OpenBookQA,
}


def require_rows(task: str, path: Path) -> None:
    """Raises InputError where a file is not one of a task's rows; file, line and entry of the first
    fault are named."""
    if not sum(1 for _ in read_rows(SCHEMAS.get(task, AnyRow), path)):
        raise InputError("it holds no rows", file=path)


def _among(value: Any, there: Any, wanted: Any) -> Any:
    """Returns the value, once what it stands for is known to be there."""
    if wanted not in there:
        raise ValueError(f"one of {', '.join(map(str, there))}")
    return value
