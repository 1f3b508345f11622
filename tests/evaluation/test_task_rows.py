"""Rows of tasks: those that lm-eval would count as wrong, or not understand, are refused with their
place."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from convert.errors import UserError
from jaxprune.evaluation.task_rows import SCHEMAS, require_rows
from jaxprune.evaluation.tasks import ZERO_SHOT, Tasks
from tests.helpers import rows

FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("boolq", {"label": 2}, "label"),
    ("boolq", {"label": True}, "label"),
    ("boolq", {"label": "1"}, "label"),
    ("boolq", {"label": None}, "label"),
    ("boolq", {"label": float("nan")}, "label"),
    ("boolq", {"passage": ""}, "passage"),
    ("rte", {"label": -1}, "label"),
    ("rte", {"sentence2": 5}, "sentence2"),
    ("hellaswag", {"label": ""}, "label"),
    ("hellaswag", {"label": "4"}, "label"),
    ("hellaswag", {"label": "0" * 5000}, "label"),
    ("hellaswag", {"endings": ["one"]}, "endings"),
    ("hellaswag", {"endings": "ran"}, "endings"),
    ("winogrande", {"answer": ""}, "answer"),
    ("winogrande", {"answer": "3"}, "answer"),
    ("winogrande", {"sentence": "no blank"}, "sentence"),
    ("arc_easy", {"answerKey": "E"}, "answerKey"),
    ("arc_easy", {"answerKey": ""}, "answerKey"),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices.label"),
    ("arc_challenge", {"choices": None}, "choices"),
    ("openbookqa", {"answerKey": 1}, "answerKey"),
]


def write(folder: Path, task: str, change: dict[str, Any]) -> Path:
    """Good rows, and on line 3 one that is changed."""
    good = rows.ROWS[task][0]
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good, good | change, good)))
    return path


@pytest.mark.parametrize(("task", "change", "entry"), FAULTS)
def test_a_row_that_cannot_be_scored_is_refused(
    task: str, change: dict[str, Any], entry: str, tmp_path: Path
) -> None:
    path = write(tmp_path, task, change)
    with pytest.raises(
        UserError, match=re.escape(f"{task}.jsonl: line 3.{entry}: an entry cannot be used")
    ):
        require_rows(task, path)


@pytest.mark.parametrize("task", ZERO_SHOT)
def test_every_entry_that_is_read_has_to_be_there(task: str, tmp_path: Path) -> None:
    require_rows(task, write(tmp_path, task, {}))
    for entry in SCHEMAS[task].model_fields:
        path = write(tmp_path, task, {})
        lines = path.read_text().splitlines()
        lines[1] = json.dumps(
            {name: value for name, value in rows.ROWS[task][0].items() if name != entry}
        )
        path.write_text("\n".join(lines))
        with pytest.raises(UserError, match=f"line 2.{entry}: an entry is missing"):
            require_rows(task, path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for content, message in (
        (b"", "it holds no rows"),
        (b"not json\n", "line 1: it is not valid JSON"),
        (b"[1, 2]\n", "an entry cannot be used"),
        (b'"\xff"\n', "line 1: it is not UTF-8"),
    ):
        (tmp_path / "boolq.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            require_rows("boolq", tmp_path / "boolq.jsonl")


def test_what_is_no_regular_file_is_not_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "boolq.jsonl")
    with pytest.raises(UserError, match="it is a FIFO, wanted a regular file"):
        Tasks(["boolq"], tmp_path)


def test_a_folder_and_names_are_taken_literally(tmp_path: Path) -> None:
    data = tmp_path / "rows [1] *"
    rows.write(data)
    assert Tasks(["boolq"], str(data)).limit is None
    for name in ("../boolq", "*", "boolq.jsonl", "", "a" * 5000, "bo\0olq"):
        with pytest.raises(UserError, match="lm-eval has no task"):
            Tasks([name], data)


def test_tasks_without_a_schema_need_a_right_choice_too(tmp_path: Path) -> None:
    row = {"goal": "to sit", "sol1": "use a mat", "sol2": "use a tree", "label": 1}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    Tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"label": -1}) + "\n"
    )
    with pytest.raises(UserError, match="row 2: lm-eval's task piqa finds no right choice"):
        Tasks(["piqa"], tmp_path)
