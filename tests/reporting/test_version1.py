"""Records and journals that version 1 wrote, byte for byte, are still read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from convert.errors import UserError
from convert.schema import to_text
from jaxprune.commands.recipe_options import parse
from jaxprune.commands.verify import main as verify
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.results import Results
from jaxprune.recipe import Recipe
from jaxprune.reporting import reading, report, schema
from jaxprune.reporting.record import Record
from jaxprune.sparsity.patterns import NMRecord, PatternRecord
from tests.helpers import tiny

RECORDS = Path(__file__).parent / "records"
FLAGS = {
    "unstructured": "--sparsity 0.666667",
    "per-output": "--method wanda --sparsity 0.6",
    "2of4": "--mask wanda --update admm --pattern 2:4 --finish-steps 3 --asymmetry 0.25",
    "best": "--preset best --sparsity 0.7 --tune-windows 2 --tune-zeros 0",
    "given": "--mask from-file:masks.safetensors --update exact",
}
"""What the runs were asked for; the first of them for 0.6666667, of which prose kept six digits."""
IDENTITIES = json.loads((RECORDS / "identities.json").read_text())


@pytest.mark.parametrize("name", FLAGS)
def test_a_record_is_what_this_version_would_have_written(name: str) -> None:
    run = reading.load(RECORDS / f"{name}.json")
    assert isinstance(run, schema.Run) and run.version == 2
    assert run.recipe() == parse(FLAGS[name].split())
    written = json.loads((RECORDS / f"{name}.json").read_text())
    assert (run.method_text, run.pattern_text) == (written["method"]["name"], written["pattern"])
    linears = [linear for layer in run.layers for linear in layer.linears.values()]
    assert len(linears) == 14 and all(linear.wanted == linear.zeros for linear in linears)
    assert reading.read(to_text(schema.as_json(run)), "again") == run


def test_reports_are_drawn_of_them() -> None:
    names = [*FLAGS, "evaluation"]
    page = report.page([reading.load(RECORDS / f"{name}.json") for name in names])
    for words in (
        "66.6667 %",
        "60 % per output",
        "2:4",
        "70 % in total",
        "the mask from-file:masks.safetensors",
    ):
        assert words in page


@pytest.mark.parametrize("name", FLAGS)
def test_checkpoints_are_verified_by_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny.save(tmp_path / "pruned", tiny.config(num_hidden_layers=2))
    shutil.copy(RECORDS / f"{name}.json", folder / "jaxprune.json")
    run = reading.load(folder)
    assert isinstance(run, schema.Run)
    stored = load_file(folder / "model.safetensors")
    for layer in run.layers:
        for path, linear in layer.linears.items():
            _zero(stored[f"model.layers.{layer.index}.{path}.weight"], linear.zeros, run.pattern)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify([str(folder)]) == 0, capsys.readouterr().out
    stored["model.layers.1.mlp.up_proj.weight"].fill_(1.0)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify([str(folder)]) == 1
    assert "layers.1.mlp.up_proj.kernel has 0 zeros, not" in capsys.readouterr().out


def _zero(weight: Any, zeros: int, pattern: PatternRecord) -> None:
    """Makes so many zeros of a weight [out, in] as a pattern has them."""
    if isinstance(pattern, NMRecord):
        weight.view(-1, pattern.m)[:, pattern.n :] = 0
    elif pattern.kind == "per-output":
        weight[:, : zeros // len(weight)] = 0
    else:
        weight.view(-1)[:zeros] = 0


def test_digits_that_prose_lost_are_no_difference() -> None:
    """At 0.6666667, 4096 × 11008 weights have 14 zeros fewer than at the 0.666667 of "66.6667
    %"."""
    record = json.loads((RECORDS / "unstructured.json").read_text())
    size = 4096 * 11008

    def wanted(zeros: int, pattern: str = "66.6667 %") -> int:
        linear = {"error": 0.1, "zeros": zeros, "size": size, "stats": {}}
        layers = [{"index": 0, "seconds": {}, "linears": {"mlp.up_proj": linear}}]
        run = reading.read(
            json.dumps(record | {"layers": layers, "pattern": pattern}), "jaxprune.json"
        )
        assert isinstance(run, schema.Run)
        return run.layers[0].linears["mlp.up_proj"].wanted

    assert round(0.666667 * size) - round(0.6666667 * size) == 14
    assert wanted(round(0.6666667 * size)) == round(0.6666667 * size)
    assert wanted(round(0.6666 * size)) == round(0.666667 * size)
    assert wanted(round(0.6666 * size), "66.66 %") == round(0.6666 * size)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("pattern", "50"), ("pattern", "50 % or so"), ("pattern", "100 %"), ("pattern", "2:4 "),
        ("pattern", "4:2"), ("pattern", "1e9999 %"), ("pattern", "٥٠ %"), ("pattern", 0.5),
        ("method", {"name": "admm"}), ("method", {"name": "x", "mask": {"name": "wanda"}}),
        ("layers", [{}]), ("sparsity", float("nan")),
    ],
)  # fmt: skip
def test_what_version_1_never_wrote_is_one_error(entry: str, value: object) -> None:
    record = json.loads((RECORDS / "unstructured.json").read_text())
    with pytest.raises(UserError, match=f"^old.json: {entry}"):
        reading.read(json.dumps(record | {entry: value}), "old.json")


@pytest.mark.parametrize("line", IDENTITIES)
def test_the_identity_of_a_journal_is_what_version_1_wrote(line: str) -> None:
    earlier = ["--tune-zeros", "0"] if "best" in line else []  # it left no zeros to the tuning then
    earlier += ["--tune-pieces", "1"] if "fast" in line else []  # and it cut no windows
    recipe = parse([*line.split(), *earlier])
    record = Record({}, recipe, np.arange(12, dtype=np.int32).reshape(3, 4))
    assert record.asked_of_version_1() == IDENTITIES[line]
    assert Recipe.from_json(recipe.to_json()) == recipe and hash(recipe)


def test_layers_of_a_journal_are_taken_up(checkpoint: Path, tmp_path: Path) -> None:
    linears = {
        path: {"error": 0.1, "zeros": 7, "size": 9, "stats": {"cg_steps": 3.0}}
        for path in ("a.b", "c")
    }
    journal = Journal(tmp_path)
    arrays = {
        "params.layers.0.a.b.kernel": np.ones(3, np.float32),
        "masks.a.b": np.ones((1, 3), np.uint8),
    }
    journal.put("pruned/0", arrays, {"index": 0, "seconds": {"solve": 1.5}, "linears": linears})
    journal.put(
        "pruned/1",
        arrays,
        {"index": 1, "seconds": {"solve": 1.5}, "linears": {"a": {"error": "much"}}},
    )
    results = Results(journal, "pruned", 2)
    layer = results.get(0)
    assert layer and layer.resumed and layer.seconds == {"solve": 1.5}
    assert layer.as_json()["linears"]["a.b"] == linears["a.b"] | {"wanted": 7}
    assert results.get(1) is None and 1 not in results
    journal.close()
