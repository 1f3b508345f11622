"""The published runs that reports compare with are those of the documentation."""

import csv
import json
from pathlib import Path

import pytest

from jaxprune.reporting import published
from jaxprune.reporting.published import compared

ROOT = Path(__file__).parents[2]


def test_the_ratios_are_those_of_the_documentation() -> None:
    with open(ROOT / "docs/results/presets.csv") as file:
        rows = {(row["row"], row["pattern"]): float(row["perplexity"]) for row in csv.DictReader(file)}
    found = json.loads(Path(published.__file__).with_suffix(".json").read_text())
    expected = {f"{percent} %": rows[found["preset"], str(percent / 100)] for percent in (50, 60, 70, 80)}
    assert found["ratios"] == {name: round(value / rows["dense", ""], 4) for name, value in expected.items()}


@pytest.mark.parametrize(
    "ratio, words",
    [
        (1.1, "is better than SmolLM2"),
        (1.1, "at 50 %"),
        (1.95, "is no better than SmolLM2"),
        (1.95, "at 50 %"),
        (1.96, "at 60 %"),
    ],
)
def test_a_ratio_finds_its_place(ratio: float, words: str) -> None:
    assert words in compared(ratio)
    assert "at 80 % zeros (5.57 times)" in compared(100)
