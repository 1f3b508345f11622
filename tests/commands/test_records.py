"""Records that this installation cannot repeat: they are shown and verified all the same."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.commands.prune import main as prune
from jaxprune.commands.report import main as report
from jaxprune.commands.run_options import parse
from jaxprune.commands.verify import main as verify
from jaxprune.reporting import record as records
from tests.helpers import families, tiny
from tests.helpers.optional import needs_torch

RECORD = Path(__file__).parents[1] / "reporting/records/unstructured.json"
ELSEWHERE = {"name": "elsewhere", "options": {"largest": 2.0}}
ADMM = {"name": "admm", "options": {}}
METHODS: dict[str, dict[str, Any]] = {
    "alone": ELSEWHERE,
    "mask": {"mask": ELSEWHERE, "update": ADMM},
    "update": {"mask": ADMM, "update": ELSEWHERE},
    "finished": {"method": ELSEWHERE, "finish": {"steps": 3}},
}
"""Methods of a package that is not installed."""
NM = {"pattern": {"n": 2, "m": 4}}
GIVEN = {"pattern": {"mask": "from-file:masks"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an option of no method": (
        {"method": ADMM | {"options": {"largest": 2.0}}},
        "largest",
    ),
    "an option out of range": ({"method": ADMM | {"options": {"damping": -1.0}}}, "damping"),
    "steps by epochs and tokens": (
        {"tuning": {"tune_epochs": 1.0, "tune_tokens": 1000}},
        "tun",
    ),
    "N:M with a spread": (NM | {"importance": {"max_deviation": 0.3}}, "max_deviation"),
    "N:M with gradual pruning": (
        NM | {"tuning": {"tune_epochs": 1.0, "tune_gradual": 0.3}},
        "tune.gradual",
    ),
    "outputs weighed within each": (
        {
            "pattern": {"sparsity": 2 / 3, "per_output": True},
            "importance": {"weigh_outputs": True},
        },
        "weigh.outputs",
    ),
    "given masks with a rule": (
        GIVEN | {"rules": [{"names": "*.q_proj"} | NM]},
        "rule",
    ),
    "an unknown grid": ({"quantize": "q9_9"}, "q9_9"),
}
"""What a record of another version may say -> its parts, and a word of the error."""
WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "tuning without steps": {"tuning": {"tune_rate": 0.01}},
    "chunks without tuning": {"tuning": {"tune_chunks": 4}},
    "windows that measure nothing": {"importance": {"sensitivity_windows": 4}},
    "an unknown preset": {"preset": "gone"},
}
"""Parts that decide nothing, as a recipe from Python may have them."""


@pytest.fixture
def pruned(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a record that can be repeated, beside all that its run takes; the current
    folder is theirs."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=2))
    shutil.copy(text, tmp_path / "text.jsonl")
    folder = shutil.copytree(tmp_path / "dense", tmp_path / "pruned")
    shutil.copy(RECORD, folder / "jaxprune.json")
    stored = load_file(folder / "model.safetensors")
    run = records.load(folder)
    assert isinstance(run, records.Run) and run.config.ckpt == "dense"
    for layer in run.layers:
        for path, kernel in layer.kernels.items():
            weight = stored[f"model.layers.{layer.index}.{path}.weight"]
            weight.reshape(-1)[: kernel.zeros] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, **parts: Any) -> None:
    """Changes parts of a record's recipe."""
    file = folder / "jaxprune.json"
    record = json.loads(file.read_text())
    record["recipe"] |= parts
    file.write_text(json.dumps(record))


def require_one_line(folder: Path, word: str, capsys: pytest.CaptureFixture, *flags: str) -> None:
    """Makes sure that a record's run is refused before it makes anything."""
    before = sorted(folder.parent.rglob("*"))
    capsys.readouterr()
    assert prune(["--config", str(folder / "jaxprune.json"), "--out", "again", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert word.replace(".", "_") in said or word.replace(".", "-") in said
    assert sorted(folder.parent.rglob("*")) == before


def require_read_or_refused(status: int, words: str, capsys: pytest.CaptureFixture) -> None:
    """Makes sure that a command either showed a record or said in one line what it does not
    read."""
    printed, said = capsys.readouterr()
    if status == 2:
        assert said.startswith("error: ") and said.count("\n") == 1
        assert "pruned/jaxprune.json" in said and printed == ""
    else:
        assert status in (0, 1) and words in " ".join(printed.split()) and said == ""


def test_the_record_can_be_repeated_before_it_is_changed(pruned: Path) -> None:
    assert prune(["--config", "pruned/jaxprune.json", "--out", "again"]) == 0


@pytest.mark.parametrize("where", METHODS)
def test_a_method_that_is_not_installed_is_shown(
    where: str, pruned: Path, capsys: pytest.CaptureFixture
) -> None:
    change(pruned, method=METHODS[where])
    run = records.load(pruned)
    assert isinstance(run, records.Run) and "elsewhere" in run.method_text
    assert report(["pruned", "--out", "page.html"]) == 0
    assert run.method_text in Path("page.html").read_text()
    assert verify(["pruned", "--against", "dense"]) == 0
    assert "verified: pruned" in " ".join(capsys.readouterr().out.split())
    require_one_line(pruned, "elsewhere", capsys)


@pytest.mark.parametrize("what", REFUSED)
def test_a_recipe_that_is_refused_today_is_one_line(
    what: str, pruned: Path, capsys: pytest.CaptureFixture
) -> None:
    parts, word = REFUSED[what]
    change(pruned, **parts)
    require_read_or_refused(report(["pruned", "--out", "page.html"]), "page.html", capsys)
    status = verify(["pruned"])
    # zeros of another pattern are problems
    assert status in (0, 2) or "pattern" in parts
    require_read_or_refused(status, "verified" if status != 1 else "not verified", capsys)
    require_one_line(pruned, word, capsys)


@pytest.mark.parametrize("what", WITHOUT_EFFECT)
def test_parts_that_decide_nothing_change_nothing(what: str, pruned: Path) -> None:
    argv = ["--config", "pruned/jaxprune.json", "--out", "again"]
    _, before = parse(argv)
    change(pruned, **WITHOUT_EFFECT[what])
    _, recipe = parse(argv)
    preset = WITHOUT_EFFECT[what].get("preset")
    assert recipe == dataclasses.replace(before, preset=preset)


@needs_torch
def test_asymmetry_with_experts_is_refused_before_any_work(
    pruned: Path, capsys: pytest.CaptureFixture
) -> None:
    families.save(pruned.parent / "experts", families.config("qwen3_moe", "mixed"))
    change(pruned, asymmetry=0.5, structure={"drop_experts": 0.5})
    assert report(["pruned", "--out", "page.html"]) == 0
    assert "asymmetry 0.5" in Path("page.html").read_text()
    assert verify(["pruned"]) == 0
    require_one_line(pruned, "asymmetry", capsys, "--ckpt", "experts")
