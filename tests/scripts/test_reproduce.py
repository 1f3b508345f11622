"""The driver of the paper's experiments on a tiny checkpoint: cells, tables, pictures, going on
where it stopped."""

import csv
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from convert.errors import UserError
from jaxprune import InputError, load
from jaxprune.commands.recipe_options import parse
from jaxprune.distill.student import Student
from jaxprune.run_store.store import RunStore
from tests.helpers import rows as task_rows

SCRIPTS = Path(__file__).parents[2] / "scripts/experiments"
SIZES = "--nsamples 4 --seqlen 32 --eval-seqlen 32 --eval-windows 4 --pack".split()


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return {
            name: importlib.import_module(name)
            for name in ("experiments", "tables", "pictures", "reproduce")
        }
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def driver(
    modules: dict[str, ModuleType],
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[ModuleType, list[str]]:
    """The driver's module with shortened experiments, and the flags of a run."""
    reproduce = modules["reproduce"]
    for name, experiment in reproduce.EXPERIMENTS.items():
        rows = {
            row: flags
            for row, flags in experiment.rows.items()
            if "rate 0.003" not in row and "alps" not in flags
        }
        patterns = tuple(p for p in experiment.patterns if p in ("0.5", "0.6", "2:4"))
        steps = experiment.steps and (1, 10)
        linears = {0.7: ("mlp.up_proj", "mlp.down_proj")} if experiment.linears else {}
        short = dataclasses.replace(
            experiment, rows=rows, patterns=patterns, steps=steps, small_steps={}, linears=linears
        )
        monkeypatch.setitem(reproduce.EXPERIMENTS, name, short)
    texts = ["--calib", str(text), "--eval-text", str(text)]
    tasks = ["--tasks-data", str(task_rows.write(tmp_path / "rows"))]
    return reproduce, ["--ckpt", str(checkpoint), "--out", str(tmp_path), *texts, *tasks, *SIZES]


def run(reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *args])
    reproduce.main()


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("fig2", "table1", "table2", "table3", "presets", "table4")
]


@pytest.mark.parametrize("name", ["fig1", "layers", *SLOW])
def test_an_experiment_leaves_a_table_and_a_picture(
    name: str, driver: tuple[ModuleType, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce, flags = driver
    run(reproduce, monkeypatch, name, *flags, "--keep")
    experiment = reproduce.EXPERIMENTS[name]
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    expected = sum(len(experiment.steps) if "{k}" in f else 1 for f in experiment.rows.values())
    expected *= len(experiment.patterns) * (2 if experiment.linears else 1)
    # 2:4 is uniform anyway
    expected -= sum("--uniform" in flags for flags in experiment.rows.values())
    assert len(rows) == expected + (experiment.measure in ("perplexity", "accuracy"))
    kept = [load(folder) for folder in tmp_path.glob("checkpoints/*")]
    assert len(kept) == expected * (experiment.measure == "accuracy")
    figure = {
        "perplexity": "perplexity",
        "error": "relative_error",
        "seconds": "seconds_solve",
        "accuracy": "acc mean",
    }
    assert all(float(row[figure[experiment.measure]]) > 0 for row in rows)
    table = (tmp_path / f"{name}.md").read_text()
    assert all(row in table for row in experiment.rows)
    assert "calibrated on 4 windows of 32 tokens of text0/text" in table
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / f"{name}.svg").read_text()
    assert "<svg" in svg and str(tmp_path) not in svg


def test_it_goes_on_where_it_stopped(
    driver: tuple[ModuleType, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce, flags = driver
    measured = []
    plain = reproduce.Bench._perplexity

    def watched(bench: object, cell: object, file: Path) -> dict:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((cell.row, cell.pattern))
        return plain(bench, cell, file)

    monkeypatch.setattr(reproduce.Bench, "_perplexity", watched)
    with pytest.raises(KeyboardInterrupt):
        run(reproduce, monkeypatch, "table2", *flags)
    assert len(list((tmp_path / "cells").iterdir())) == 3
    assert not (tmp_path / "table2.csv").exists()
    monkeypatch.setattr(reproduce.Bench, "_perplexity", plain)
    run(reproduce, monkeypatch, "table2", *flags)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert len(finished) == 7
    # Another experiment takes the cells that it shares; other windows share none.
    monkeypatch.setattr(reproduce.Bench, "_perplexity", None)
    run(reproduce, monkeypatch, "table2", *flags)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == finished
    with pytest.raises(TypeError):
        run(reproduce, monkeypatch, "table2", *flags, "--seed", "1")


def test_what_there_is_by_now_is_shown(
    driver: tuple[ModuleType, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce, flags = driver
    # table1's cells of Wanda's mask, SparseGPT and ADMM-Grad at 60 %
    run(reproduce, monkeypatch, "table2", *flags)
    monkeypatch.setattr(reproduce.Bench, "_perplexity", None)
    run(reproduce, monkeypatch, "table1", *flags, "--only-measured")
    rows = {
        line.split(" | ")[0]: line for line in (tmp_path / "table1.md").read_text().splitlines()
    }
    assert rows["| ADMM1"].count("not run") == 2
    assert "| Wanda" not in rows
    assert len((tmp_path / "table1.csv").read_text().splitlines()) == 1 + 4
    assert (tmp_path / "table1.png").exists()
    with pytest.raises(InputError, match=r"3 of fig2's 7 cells are measured"):
        run(reproduce, monkeypatch, "fig2", *flags, "--only-measured", "--seed", "0")
    measured, of_rows = set(), set()

    def measure(bench: object, cell: object, file: Path) -> dict:
        measured.add(cell.pattern)
        of_rows.add(cell.row)
        return {"perplexity": 7.0, "error": 0.1, "seconds": {"solve": 1.0}}

    monkeypatch.setattr(reproduce.Bench, "_perplexity", measure)
    run(reproduce, monkeypatch, "table1", *flags, "--patterns", "2:4")
    assert measured == {"2:4"}
    assert (tmp_path / "table1.md").read_text().count("not run") > 2
    with pytest.raises(SystemExit):
        run(reproduce, monkeypatch, "table1", *flags, "--patterns", "0.7")
    of_rows.clear()
    run(reproduce, monkeypatch, "table1", *flags, "--rows", "ADMM1", "--seed", "1")
    assert of_rows == {"dense", "ADMM1"}
    with pytest.raises(SystemExit):
        run(reproduce, monkeypatch, "table1", *flags, "--rows", "thorough")


def test_a_cell_that_tunes_on_a_text_goes_on(
    driver: tuple[ModuleType, list[str]],
    modules: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reproduce, flags = driver
    short = dataclasses.replace(
        reproduce.EXPERIMENTS["budgets"],
        rows={"thorough": "--preset thorough --tune-tokens 256 --tune-chunks 1"},
        patterns=("0.5",),
        measure="perplexity",
        against=(),
    )
    monkeypatch.setitem(reproduce.EXPERIMENTS, "budgets", short)
    monkeypatch.setattr(RunStore, "worth_saving", lambda *_: True)
    step, steps = Student.step, []

    def counted(*args: object) -> float:
        steps.append(args)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(Student, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        run(reproduce, monkeypatch, "budgets", *flags)
    assert [path.suffix for path in sorted((tmp_path / "cells").iterdir())] == [
        ".json",
        ".unfinished",
    ]
    run(reproduce, monkeypatch, "budgets", *flags)
    assert len(steps) == 4 + 8 - 3
    assert {path.suffix for path in (tmp_path / "cells").iterdir()} == {".json"}
    (row,) = (
        row
        for row in csv.DictReader((tmp_path / "budgets.csv").read_text().splitlines())
        if row["row"] == "thorough"
    )
    assert float(row["perplexity"]) > 1 and not row["seconds_tune"]
    (cell,) = (
        json.loads(path.read_text())["result"] for path in (tmp_path / "cells").glob("*-thorough-*")
    )
    assert [tokens for tokens, _ in cell["divergences"]] == [0, 128, 256] and cell["resumed"]


def test_the_papers_numbers_stand_beside_ours_where_the_model_is_the_papers(
    modules: dict[str, ModuleType],
) -> None:
    reproduce, tables = modules["reproduce"], modules["tables"]
    experiment = reproduce.EXPERIMENTS["table5"]
    results = [
        (cell, {"perplexity": 7.0, "error": 0.1}) for cell in reproduce.cells(experiment, 32)
    ]
    lines = "\n".join(tables._tables(experiment, "llama2-13b", results))
    for number in (4.57, 5.52, 7.75, 94.23, 8.27, 2000):
        assert f"7.00 (paper {number:g})" in lines
    assert "paper" not in "\n".join(tables._tables(experiment, "smollm2-135m", results))
    table2 = reproduce.EXPERIMENTS["table2"]
    results = [(cell, {"perplexity": 9.5, "error": 0.1}) for cell in reproduce.cells(table2, 32)]
    assert "9.50 (paper 9.92)" in "\n".join(tables._tables(table2, "llama-7b", results))


def test_rows_are_compared_with_the_better_of_some(modules: dict[str, ModuleType]) -> None:
    reproduce, tables = modules["reproduce"], modules["tables"]
    experiment = reproduce.EXPERIMENTS["presets"]
    figures = {"ADMM-Grad, constant": (50, 10), "ALPS": (40, 20), "best": (30, 55)}
    results = [
        (
            cell,
            {
                "perplexity": float(figures[cell.row][0]),
                "error": 0.1,
                "seconds": {"gram": figures[cell.row][1]},
            },
        )
        for cell in reproduce.cells(experiment, 30)
        if cell.row in figures
    ]
    lines = tables._by_pattern(
        experiment,
        "smollm2-135m",
        [(reproduce.Cell("dense", "", None, None), {"perplexity": 9.0}), *results],
    )
    assert (
        f"| best |{' 0.750 |' * 5}" in lines and f"| ADMM-Grad, constant |{' 1.250 |' * 5}" in lines
    )
    assert f"| best |{' 55 s (5.50) |' * 5}" in lines


def test_gains_are_drawn_of_what_there_is(modules: dict[str, ModuleType]) -> None:
    reproduce, pictures = modules["reproduce"], modules["pictures"]
    experiment = reproduce.EXPERIMENTS["ablation"]
    figures = {"ADMM-Grad, constant": 50.0, "ALPS": 40.0, "fast": 32.0, "best": 30.0}
    results = [
        (cell, {"perplexity": figures[cell.row]})
        for cell in reproduce.cells(experiment, 30)
        if cell.row in figures
        and (cell.pattern == "0.7" or (cell.pattern, cell.row) == ("2:4", "best"))
    ]
    figure, _ = pictures._gains(experiment, results)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(figures)
    (points,) = (line for line in axis.lines if line.get_marker() not in ("None", None, ""))
    assert (points.get_label(), list(points.get_xdata())) == ("70 %", [1.25, 1.0, 0.8, 0.75])


def test_quality_by_minutes_places_rows_at_their_median_time(
    modules: dict[str, ModuleType],
) -> None:
    reproduce, pictures = modules["reproduce"], modules["pictures"]
    experiment = reproduce.EXPERIMENTS["budgets"]
    cells = {(cell.row, cell.pattern): cell for cell in reproduce.cells(experiment, 30)}
    found = {("dense", ""): (20.0, 0)}
    found |= {
        ("fast", pattern): (40.0, 60 * m) for pattern, m in (("0.5", 2), ("0.7", 3), ("0.8", 9))
    }
    found |= {("best", "0.7"): (35.0, 360)}
    results = [
        (
            cells[key],
            {"perplexity": value, "seconds": {"gram": 0.75 * seconds, "tune": 0.25 * seconds}},
        )
        for key, (value, seconds) in found.items()
    ]
    # by how much is not known
    resumed = {"perplexity": 30.0, "seconds": {"tune": 1.0}, "resumed": True}
    resumed["divergences"] = [[0, 1.2], [1000, 0.8]]
    results.append((cells["thorough, a million tokens", "0.7"], resumed))
    # before those of fast
    results.insert(1, (cells["best", "0.5"], {"perplexity": 31.0, "seconds": {"tune": 360}}))
    figure, _ = pictures._quality_by_minutes(experiment, results)
    axis, below = figure.axes
    (curve,) = below.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0, 1000], [1.2, 0.8])
    lines = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines
    }
    assert lines["70 %"] == ([3.0, 6.0], [40.0, 35.0]) and lines["80 %"] == ([3.0], [40.0])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["3\nfast", "6\nbest"]


def test_every_row_of_every_experiment_is_a_recipe(modules: dict[str, ModuleType]) -> None:
    for experiment in modules["experiments"].EXPERIMENTS.values():
        made = list(modules["reproduce"].cells(experiment, 30))
        assert len({(c.row, c.pattern, c.step, c.linear, c.seed) for c in made}) == len(made)
        for pattern in experiment.patterns:
            assert any(c.pattern == pattern for c in made)
        for key in {key for numbers in experiment.paper.values() for key in numbers} - {
            ("dense", "")
        }:
            assert key[0] in experiment.rows and key[1] in experiment.patterns
        small = {
            (c.row, c.pattern, c.step, c.linear, c.seed)
            for c in modules["reproduce"].cells(experiment, 30, small=True)
        }
        assert small <= {(c.row, c.pattern, c.step, c.linear, c.seed) for c in made}


@pytest.mark.slow
def test_seeds_are_averaged_on_every_text(
    driver: tuple[ModuleType, list[str]],
    modules: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reproduce, flags = driver
    short = dataclasses.replace(
        reproduce.EXPERIMENTS["comparison"],
        rows={"magnitude": "--method magnitude", "Wanda": "--method wanda"},
        patterns=("0.5", "0.6"),
        seeds={"Wanda": {"0.6": 2}},
    )
    monkeypatch.setitem(reproduce.EXPERIMENTS, "comparison", short)
    run(reproduce, monkeypatch, "comparison", *flags, "--hold-out", "3")
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["row"], row["pattern"], row["seed"]) for row in rows]
    assert found == [
        ("dense", "", "0"),
        ("magnitude", "0.5", "0"),
        ("magnitude", "0.6", "0"),
        ("Wanda", "0.6", "0"),
        ("Wanda", "0.6", "1"),
    ]
    texts = {key.removeprefix("kl ") for key in rows[0] if key.startswith("kl ")}
    assert len(texts) == 2 and any("held-out-3" in text for text in texts)
    one, other = (float(row["perplexity"]) for row in rows[3:])
    assert one != other  # calibrated on other windows
    page = (tmp_path / "comparison.md").read_text()
    mean = modules["tables"].mean_text([one, other])
    assert f"| Wanda |  | {mean} |" in page and " ± " in mean


def test_means_have_the_digits_that_deviations_allow(modules: dict[str, ModuleType]) -> None:
    text = modules["tables"].mean_text
    assert text([61.234, 61.9, 60.1]) == "61.1 ± 0.9"
    assert text([0.6512, 0.6532]) == "0.6522 ± 0.0014"
    assert text([418.2, 478.9, 360.3]) == "419 ± 59"
    assert (text([]), text([3.14159]), text([2.0, 2.0])) == ("", "3.14", "2.00 ± 0.00")


@pytest.mark.slow
def test_bad_input_of_the_driver_is_one_error(checkpoint: Path, tmp_path: Path) -> None:
    def command(*args: object) -> subprocess.CompletedProcess:
        line = [sys.executable, str(SCRIPTS), *map(str, args)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    flags = ["--ckpt", checkpoint, "--out", tmp_path / "out", "--small", "--calib", "nowhere.jsonl"]
    done = command("table3", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no text 'nowhere.jsonl'")
    assert not (tmp_path / "out").exists()
    done = command("table9", *flags)
    assert done.returncode == 2 and "invalid choice: 'table9'" in done.stderr


def test_the_parser_of_rows_takes_recipes_only() -> None:
    with pytest.raises(UserError, match="--ckpt"):
        parse(["--ckpt", "x"])
