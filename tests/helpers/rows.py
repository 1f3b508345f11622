"""A few rows of each of the paper's tasks, made up, with the fields that lm-eval reads."""

import json
from pathlib import Path
from typing import Any

CHOICES = {"text": ["a cat", "a big red dog", "the old mat", "blue"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {
            "passage": "The cat sat on the mat.",
            "question": "did the cat sit on the mat",
            "label": 1,
            "idx": 0,
        },
        {"passage": "The dog ran.", "question": "did the cat run", "label": 0, "idx": 1},
        {"passage": "The dog ran. " * 120, "question": "is the dog old", "label": 0, "idx": 2},
    ],
    "rte": [
        {"sentence1": "The cat sat.", "sentence2": "A cat sat.", "label": 0, "idx": 0},
        {"sentence1": "The dog ran.", "sentence2": "The cat ran.", "label": 1, "idx": 1},
    ],
    "hellaswag": [
        {
            "ind": number,
            "activity_label": "Walking",
            "ctx_a": "The dog sat on the mat.",
            "ctx_b": "it",
            "ctx": "The dog sat on the mat. it",
            "endings": [
                "ran under the house.",
                "was blue and red.",
                "ran.",
                "sat on the very old tree and ran.",
            ],
            "source_id": "",
            "split": "val",
            "split_type": "indomain",
            "label": str(number),
        }
        for number in range(3)
    ],
    "winogrande": [
        {
            "sentence": "The dog ran from the cat and _ was big.",
            "option1": "dog",
            "option2": "cat",
            "answer": "1",
        },
        {
            "sentence": "The mat was under the cat so _ was old.",
            "option1": "mat",
            "option2": "cat",
            "answer": "2",
        },
    ],
    "arc_easy": [
        {"id": "1", "question": "What sat on the mat?", "choices": CHOICES, "answerKey": "A"}
    ],
    "arc_challenge": [
        {"id": "2", "question": "Which was very big?", "choices": CHOICES, "answerKey": "B"}
    ],
    "openbookqa": [
        {"id": "3", "question_stem": "The cat sat on", "choices": CHOICES, "answerKey": "C"}
    ],
}


def write(folder: Path) -> Path:
    """Writes TASK.jsonl files; winogrande's rows are in a .parquet file."""
    from datasets import Dataset

    folder.mkdir()
    for task, rows in ROWS.items():
        if task == "winogrande":
            Dataset.from_list(rows).to_parquet(folder / f"{task}.parquet")
        else:
            (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
