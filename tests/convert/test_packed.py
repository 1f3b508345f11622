import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert import CheckpointError, open_checkpoint, packed
from convert.__main__ import main
from convert.errors import DamagedError
from tests.helpers import families, tiny
from tests.helpers.checkpoints import same, tensors
from tests.helpers.zeros import pruned


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return pruned(tiny.save(folder / "dense", tiny.config(), dtype="bfloat16"), folder / "pruned")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("level", [0, 3])
def test_there_and_back_is_bit_for_bit(
    dtype: str, pattern: str, level: int, tmp_path: Path
) -> None:
    source = pruned(
        tiny.save(tmp_path / "dense", tiny.config(), dtype=dtype), tmp_path / "pruned", pattern
    )
    assert main([str(source), str(tmp_path / "small"), "--to", "packed", "--zstd", str(level)]) == 0
    assert open_checkpoint(tmp_path / "small").spec == open_checkpoint(source).spec
    kinds = {
        t["layout"]["kind"]
        for t in json.loads((tmp_path / "small/packed.json").read_text())["tensors"].values()
    }
    assert kinds == {"whole", "groups" if ":" in pattern else "mask"}
    assert main([str(tmp_path / "small"), str(tmp_path / "back")]) == 0
    assert same(tensors(source), tensors(tmp_path / "back"))
    assert not (tmp_path / "back" / "packed.json").exists()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "opt"])
def test_names_of_all_families_come_back(family: str, tmp_path: Path) -> None:
    families.save(
        tmp_path / "dense", families.config(family, next(iter(families.VARIANTS[family])))
    )
    source = pruned(tmp_path / "dense", tmp_path / "pruned")
    assert main([str(source), str(tmp_path / "small"), "--to", "packed"]) == 0
    assert main([str(tmp_path / "small"), str(tmp_path / "back")]) == 0
    assert same(tensors(source), tensors(tmp_path / "back"))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_some_rows_stand_for_a_large_tensor(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    source = pruned(
        tiny.save(tmp_path / "dense", config, dtype="float16"), tmp_path / "pruned", pattern
    )
    assert main([str(source), str(tmp_path / "small"), "--to", "packed"]) == 0
    reader = packed.Reader(tmp_path / "small")
    params, whole = reader.read(reader.spec), sum(map(reader.stored_bytes, reader.spec))
    assert packed.estimated_bytes(params) == whole
    monkeypatch.setattr(packed, "SAMPLED", 2**13)
    assert packed.estimated_bytes(params) == pytest.approx(whole, rel=0.05)


def test_the_readme_unpacks_without_jaxprune(source: Path, tmp_path: Path) -> None:
    other = pruned(
        tiny.save(tmp_path / "dense", tiny.config(), dtype="bfloat16"), tmp_path / "other", "2:4"
    )
    for number, (checkpoint, level) in enumerate([(source, "0"), (source, "19"), (other, "3")]):
        folder = tmp_path / str(number)
        assert main([str(checkpoint), str(folder), "--to", "packed", "--zstd", level]) == 0
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        found: dict[str, Callable[..., np.ndarray]] = {}
        exec(code, found)
        assert same(
            {name: found["unpacked"](folder, name) for name in tensors(checkpoint)},
            tensors(checkpoint),
        )


def test_zstd_makes_it_smaller(source: Path, tmp_path: Path) -> None:
    sizes = []
    for level in (0, 3):
        assert (
            main([str(source), str(tmp_path / str(level)), "--to", "packed", "--zstd", str(level)])
            == 0
        )
        sizes.append(
            sum(file.stat().st_size for file in open_checkpoint(tmp_path / str(level)).files)
        )
    assert sizes[1] < 0.95 * sizes[0]


def test_what_is_not_pruned_is_refused_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(checkpoint), str(tmp_path / "small"), "--to", "packed"]) == 2
    assert "it is not pruned" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, message",
    [("--to hf --zstd 3", "leave --zstd out"), ("--to packed --zstd 23", "choose another --zstd")],
)
def test_levels_that_cannot_be(
    line: str, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(source), str(tmp_path / "small"), *line.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["0", "3"])
def test_a_flipped_byte_is_one_line(level: str, source: Path, tmp_path: Path) -> None:
    assert main([str(source), str(tmp_path / "small"), "--to", "packed", "--zstd", level]) == 0
    file = tmp_path / "small/packed/layers.1.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    for place in generator.integers(start, len(content), 20):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        reader = open_checkpoint(tmp_path / "small")
        with pytest.raises(DamagedError):
            reader.read(reader.spec)


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("version", 2, "version"),
        ("format", "other", "format"),
        (
            "tensors.model.layers.0.mlp.up_proj.weight.shape",
            [2**40, 2**39],
            "incomplete or damaged",
        ),
        (
            "tensors.model.layers.0.mlp.up_proj.weight.layout",
            {"kind": "groups", "n": 4, "m": 4},
            "layout",
        ),
        (
            "tensors.model.layers.0.mlp.up_proj.weight.layout",
            {"kind": "mask", "kept": 2**50},
            "another than the index",
        ),
        ("tensors.model.layers.0.mlp.up_proj.weight.layout", {"kind": "whole"}, "missing"),
        ("tensors.model.layers.0.mlp.up_proj.weight.file", "../x.safetensors", "file"),
        ("tensors.model.layers.0.mlp.up_proj.weight.file", "packed/x.safetensors", "missing"),
    ],
)
def test_an_index_that_lies_is_one_line(
    entry: str, value: object, message: str, source: Path, tmp_path: Path
) -> None:
    assert main([str(source), str(tmp_path / "small"), "--to", "packed", "--zstd", "0"]) == 0
    index = json.loads((tmp_path / "small/packed.json").read_text())
    place, key = index, entry
    if entry.startswith("tensors."):
        name, _, key = entry.removeprefix("tensors.").rpartition(".")
        place = index["tensors"][name]
    place[key] = value
    (tmp_path / "small/packed.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "small")


def test_a_frame_of_more_than_it_should_hold_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed.planes, "PAYS", 2.0)  # whatever it is, it is compressed
    compress = packed.planes.zstd.compress
    more = bytes(10**6)
    monkeypatch.setattr(
        packed.planes.zstd, "compress", lambda plane, level: compress(bytes(plane) + more, level)
    )
    assert main([str(source), str(tmp_path / "small"), "--to", "packed"]) == 0
    reader = open_checkpoint(tmp_path / "small")
    with pytest.raises(DamagedError, match="something else than"):
        reader.read(["embed_tokens.embedding"])
