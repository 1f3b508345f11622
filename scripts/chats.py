"""Makes conversations out of the rows of lm-eval's tasks: a question, and its right answer.

    python scripts/chats.py TASKS OUT

TASKS holds arc_challenge.jsonl, arc_easy.jsonl, boolq.jsonl, hellaswag.jsonl and openbookqa.jsonl,
as for --tasks-data. OUT/train.jsonl and OUT/test.jsonl get every second row each, one conversation
a line, under "messages".
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.destination import destination, staged
from convert.writing import write_text


def _chosen(question: str, row: dict[str, Any]) -> tuple[str, str]:
    texts = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return "\n".join([question, *(f"- {text}" for text in texts.values())]), texts[row["answerKey"]]


TASKS: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "arc_challenge": lambda row: _chosen(row["question"], row),
    "arc_easy": lambda row: _chosen(row["question"], row),
    "boolq": lambda row: (
        f"{row['passage']}\n\n{row['question']}?",
        "Yes." if row["label"] else "No.",
    ),
    "hellaswag": lambda row: (f"What comes next? {row['ctx']}", row["endings"][int(row["label"])]),
    "openbookqa": lambda row: _chosen(row["question_stem"], row),
}
"""Task -> what makes a row a question and its answer."""


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    chats = []
    for name, of_row in TASKS.items():
        for line in (args.tasks / f"{name}.jsonl").read_text().splitlines():
            said = zip(("user", "assistant"), of_row(json.loads(line)), strict=True)
            chats.append(
                json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})
            )
    order = np.random.default_rng(0).permutation(len(chats))
    for number, split in enumerate(("train", "test")):
        with staged(destination(args.out / f"{split}.jsonl", folder=False)) as made:
            write_text(made, "".join(f"{chats[index]}\n" for index in order[number::2]))


if __name__ == "__main__":
    main()
