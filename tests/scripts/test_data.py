"""The files that the results use, made from a cache in the hub's layout."""

import dataclasses
import gzip
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.helpers.checkpoints import cache, content

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("data")


def put(hub: Path, product: Any, rows: Sequence[dict[str, Any]], *, lfs: bool = True) -> Path:
    """Puts rows into a hub's cache as a product's source, named by its checksum, and returns that
    file."""
    repository = hub / f"datasets--{product.repository.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    if not repository.exists():
        cache(hub, product.repository, kind="datasets")
    made = hub / "made"
    if product.file.endswith(".gz"):
        lines = [json.dumps(row, separators=(",", ":")) for row in rows]
        made.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 1))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), made)
    raw = made.read_bytes()
    digest = hashlib.sha256(raw) if lfs else hashlib.sha1(b"blob " + f"{len(raw)}\0".encode() + raw)
    blob = repository / "blobs" / digest.hexdigest()
    blob.parent.mkdir(exist_ok=True)
    made.rename(blob)
    link = snapshot / product.file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return blob


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def run(
    script: ModuleType, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the script for three small products, whose sources are in the cache."""
    rows = {
        "c4/c4-train-sample.jsonl": [
            {"text": f"Grüße\u2028{n}\r\n", "timestamp": "2019-04-25T12:57:54Z", "url": f"u{n}"}
            for n in range(3)
        ],
        "wikitext2/test.jsonl": [{"text": ""}, {"text": " = Ä = \n"}],
        "tasks/rte.jsonl": [
            {"sentence1": "One.", "sentence2": "Two.", "label": 1, "idx": 0},
        ],
    }
    products = []
    for product in script.PRODUCTS:
        if product.path in rows:
            kept = rows[product.path][: product.most and 2]
            digest = product.sha256 and hashlib.sha256(text_of(kept).encode()).hexdigest()
            products.append(dataclasses.replace(product, sha256=digest, most=product.most and 2))
            hub.mkdir(exist_ok=True)
            put(hub, product, rows[product.path], lfs="rte" not in product.path)
    monkeypatch.setattr(script, "PRODUCTS", tuple(products))

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path / "out")])
        return script.main()

    return run


def test_files_are_made_once_and_missing_ones_again(
    run: Callable[[], int], tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert capsys.readouterr().out.count("made") == 3
    out = tmp_path / "out"
    lines = (out / "c4/c4-train-sample.jsonl").read_text().splitlines()
    assert len((out / "c4/c4-train-sample.jsonl").read_bytes().split(b"\n")) == 3
    assert '"text": "Grüße' in lines[0]
    made = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    (out / "tasks/rte.jsonl").unlink()
    assert run() == 0
    found = capsys.readouterr().out
    assert found.count("is there") == 2 and found.count("made") == 1
    assert content(out) == made
    assert all(
        path.stat().st_mtime_ns == time for path, time in times.items() if "rte" not in path.name
    )


@pytest.mark.parametrize("name", ["c4/c4-train-sample.jsonl", "wikitext2/test.jsonl"])
def test_another_file_is_never_replaced(
    name: str, run: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert run() == 1
    assert own.read_text() == "mine"
    first, last = capsys.readouterr().err.splitlines()
    assert str(own) in first and "not replaced" in first and "1 of 3 files" in last


def test_without_a_hub_each_missing_file_is_one_line(
    run: Callable[[], int], hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(hub)
    assert run() == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "3 of 3 files" in last
    assert all("missing: " in line and "of the dataset" in line for line in lines)
    assert not list(tmp_path.glob("out/**/*.jsonl"))


@pytest.mark.parametrize("name", ["c4", "wikitext", "glue"])
def test_a_damaged_source_is_an_error(
    name: str, run: Callable[[], int], hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blob,) = hub.glob(f"datasets--*{name}/blobs/*")
    blob.write_bytes(blob.read_bytes()[:-1])
    assert run() == 1
    first, _ = capsys.readouterr().err.splitlines()
    assert str(blob) in first and "damaged" in first


def test_other_rows_than_those_of_the_results_are_an_error(
    run: Callable[[], int],
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, *others = script.PRODUCTS
    monkeypatch.setattr(script, "PRODUCTS", (dataclasses.replace(first, sha256="0" * 64), *others))
    assert run() == 1
    assert "has other rows" in capsys.readouterr().err
    assert not (tmp_path / "out" / first.path).exists()


def test_a_source_without_a_field_is_an_error(
    run: Callable[[], int],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, *others = script.PRODUCTS
    monkeypatch.setattr(
        script, "PRODUCTS", (dataclasses.replace(first, fields=("absent",)), *others)
    )
    assert run() == 1
    assert "cannot be read (KeyError: 'absent')" in capsys.readouterr().err


def test_the_products_are_the_data_of_the_results(
    script: ModuleType, hub: Path, tmp_path: Path, data: Path
) -> None:
    """From sources in the hub's formats, made of the files themselves."""
    hub.mkdir()
    tested = 0
    for product in script.PRODUCTS:
        if product.sha256 is None:
            continue
        file = data / product.path
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        put(hub, product, rows)
        assert script.make(product, tmp_path / "out") == "made"
        assert (tmp_path / "out" / product.path).read_bytes() == file.read_bytes()
        tested += 1
    assert tested == 9
