"""The published runs that reports compare with are those of the documentation."""

import csv
import json
from pathlib import Path

import pytest

from jaxprune.reporting import documented_runs
from jaxprune.reporting.documented_runs import compared

ROOT = Path(__file__).parents[2]
FILE = Path(documented_runs.__file__).with_suffix(".json")


def test_the_ratios_are_those_of_the_documentation() -> None:
    with open(ROOT / "docs/results/presets.csv") as file:
        rows = {
            (row["row"], row["pattern"]): float(row["perplexity"]) for row in csv.DictReader(file)
        }
    found = json.loads(FILE.read_text())
    expected = {
        f"{percent} %": rows[found["preset"], str(percent / 100)] for percent in (50, 60, 70, 80)
    }
    assert found["ratios"] == {
        name: round(value / rows["dense", ""], 4) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "pattern, over, how, place",
    [
        ("50 %", 0.9, "less", "50 %"),
        ("50 %", 1.1, "no less", "50 %"),
        ("60 %", 0.99, "no less", "50 %"),
        ("60 %", 1.0, "no less", "60 %"),
        ("80 %", 20, "no less", "80 %"),
    ],
)
def test_a_ratio_finds_its_place(pattern: str, over: float, how: str, place: str) -> None:
    ratios = json.loads(FILE.read_text())["ratios"]
    found = compared(over * ratios[pattern])
    assert found.startswith(f"That is {how} than the {ratios[place]:.2f} times that")
    assert f"SmolLM2-135M with {place} zeros and --preset best" in found
