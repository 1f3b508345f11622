"""A record is read back as it was written; what is damaged in it is one clear line."""

import contextlib
import copy
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from convert.command import worded
from convert.errors import UserError
from convert.schema import dump, to_text
from jaxprune.commands.recipe_options import parse
from jaxprune.commands.verify import main as verify
from jaxprune.reporting import record as records
from jaxprune.reporting import report
from jaxprune.sparsity.patterns import NM, RecipePattern, Unstructured, percent
from tests.helpers import tiny

RECORDS = Path(__file__).parent / "records"
WRONG = {
    "missing": None,
    "null": "null",
    "text": '"x"',
    "zero": "0",
    "negative": "-1",
    "huge": "1e308",
    "5000 digits": "9" * 5000,
    "NaN": "NaN",
    "infinity": "-Infinity",
    "list": "[]",
    "object": "{}",
    "deep": "[" * 5000 + "]" * 5000,
    "lone surrogate": '"\\ud800"',
    "mathtext": '"$\\\\frac{$"',
    "control characters": '"\\u0000\\u001b[2J\\n</script><b>"',
}
"""JSON texts that stand in an entry's place."""


FLAGS = {
    "unstructured": "--sparsity 0.666667",
    "per-output": "--method wanda --sparsity 0.6",
    "2of4": "--mask wanda --update admm --pattern 2:4 --finish-steps 3 --asymmetry 0.25",
    "best": "--preset best --sparsity 0.7 --tune-windows 2 --tune-gradual 0",
    "given": "--mask from-file:masks.safetensors --update exact",
}
"""What the runs of the records were asked for."""


TEXTS = {
    "unstructured": ("admm", "66.6667 %"),
    "per-output": ("wanda", "60 % per output"),
    "2of4": ("wanda mask, admm update, 3 steps to finish, asymmetry 0.25", "2:4"),
    "best": (
        "best: admm, outputs weighed, sparsities within 0.3, 2 epochs of tuning",
        "70 % in total",
    ),
    "given": ("exact", "the mask from-file:masks.safetensors"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_record_has_the_recipe_that_was_asked_for(name: str) -> None:
    run = records.load(RECORDS / f"{name}.json")
    assert isinstance(run, records.Run)
    assert run.recipe == parse(FLAGS[name].split())
    assert (run.method_text, run.pattern_text) == TEXTS[name]
    assert records.read(to_text(dump(run)), "again") == run


def test_reports_are_drawn_of_them() -> None:
    names = [*FLAGS, "evaluation"]
    page = report.page([records.load(RECORDS / f"{name}.json") for name in names])
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
    run = records.load(folder)
    assert isinstance(run, records.Run)
    stored = load_file(folder / "model.safetensors")
    for layer in run.layers:
        for path, kernel in layer.kernels.items():
            weight = stored[f"model.layers.{layer.index}.{path}.weight"]
            _zero(weight, kernel.zeros, run.recipe.pattern)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify([str(folder)]) == 0, capsys.readouterr().out
    stored["model.layers.1.mlp.up_proj.weight"].fill_(1.0)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify([str(folder)]) == 1
    assert "layers.1.mlp.up_proj.kernel has 0 zeros, not" in capsys.readouterr().out


def _zero(weight: Any, zeros: int, pattern: RecipePattern) -> None:
    """Makes so many zeros of a weight [out, in] as a pattern has them."""
    if isinstance(pattern, NM):
        weight.view(-1, pattern.m)[:, pattern.n :] = 0
    elif isinstance(pattern, Unstructured) and pattern.per_output:
        weight[:, : zeros // len(weight)] = 0
    else:
        weight.view(-1)[:zeros] = 0


def run() -> dict[str, Any]:
    return dump(records.load(RECORDS / "unstructured.json"))


def evaluation() -> dict[str, Any]:
    return dump(records.load(RECORDS / "evaluation.json"))


def places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each entry; of lists the first only, and not into an evaluation's runs."""
    if way:
        yield way
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value if key != "run" else None, (*way, key))
    elif isinstance(tree, list) and tree:
        yield from places(tree[0], (*way, 0))


def changed(record: dict[str, Any], way: tuple[Any, ...], content: str | None) -> str:
    """The JSON of a record with another text in an entry's place; None: without the entry."""
    *path, last = way
    copied = parent = copy.copy(record)
    for part in path:
        parent[part] = copy.copy(parent[part])
        parent = parent[part]
    if content is None:
        del parent[last]
        return json.dumps(copied)
    parent[last] = "here it goes"
    return json.dumps(copied).replace('"here it goes"', content)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["run", "evaluation"])
def test_a_damaged_entry_is_one_line(kind: str, wrong: str) -> None:
    record = run() if kind == "run" else evaluation()
    for way in places(record):
        try:
            found = records.read(changed(record, way, WRONG[wrong]), "jaxprune.json")
        except UserError as error:
            assert "\n" not in worded(error) and str(error).startswith("jaxprune.json: "), way
        else:
            assert records.read(to_text(dump(found)), "again") == found


@pytest.mark.parametrize("wrong", WRONG)
def test_all_that_is_no_damage_is_shown(wrong: str) -> None:
    """A record with a strange value wherever the schema allows it: pages are drawn and verify reads
    it."""
    record = run()
    for way in [way for way in places(record) if way not in (("schema",), ("kind",))]:
        with contextlib.suppress(UserError, KeyError, IndexError, TypeError):
            text = changed(record, way, WRONG[wrong])
            records.read(text, "jaxprune.json")
            record = json.loads(text)
    found = records.read(json.dumps(record), "jaxprune.json")
    assert isinstance(found, records.Run) and records.expected(found)
    page = report.page([found])
    assert "<b>" not in page and page.count("</script>") == 0
    page.encode()


def test_no_entry_of_the_record_is_read_unchecked() -> None:
    """A number in place of a text, and the other way round, is refused wherever it stands."""
    record = run()
    for way in places(record):
        value: Any = record
        for part in way:
            value = value[part]
        if way[0] != "config" and not isinstance(value, dict | list) and value is not None:
            with pytest.raises(UserError):
                records.read(changed(record, way, "[[]]"), "jaxprune.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "jaxprune.json: it is not valid JSON"),
        (b"", "jaxprune.json: it is not valid JSON"),
        (
            b'{"schema": 3, "kind": "walk"}',
            "jaxprune.json: kind: an entry cannot be used, found 'walk', wanted 'run' or",
        ),
        (
            b'{"kind": "run", "schema": 4}',
            "jaxprune.json: schema: it was written by another version of jaxprune",
        ),
    ],
)
def test_what_is_no_record_is_one_error(content: bytes, message: str) -> None:
    with pytest.raises(UserError) as raised:
        records.read(content, "jaxprune.json")
    assert str(raised.value).startswith(message)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "jaxprune.json")
    with pytest.raises(UserError, match="it is a FIFO, wanted a regular file"):
        records.run_of(tmp_path)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/jaxprune.json").symlink_to("jaxprune.json")
    with pytest.raises(UserError, match="it cannot be read"):
        records.run_of(tmp_path / "loop")
    assert records.run_of(tmp_path / "nowhere") is None


def test_what_is_written_is_json_whatever_is_in_it() -> None:
    written = to_text({"a": [1, math.nan, (math.inf, "b")], "name\udcff": "\udc80 \ud800"})
    assert json.loads(written) == {"a": [1, None, [None, "b"]], "name\\udcff": "\\udc80 \\ud800"}


@pytest.mark.parametrize(
    "sparsity", [0.0, 1e-07, 1 / 3, 0.5, 0.57, 0.6666667, 0.6666666666666666, 0.9999999999999999]
)
def test_words_have_all_digits(sparsity: float) -> None:
    words = percent(sparsity)
    assert "e" not in words and float(f"{words}e-2") == sparsity
