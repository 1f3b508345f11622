"""Runs that end on a grid: a GGUF file holds what they solved for."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import open_checkpoint
from convert.__main__ import main as convert
from jaxprune import Context, InputError, Recipe, load, prune_model
from jaxprune.__main__ import main
from jaxprune.commands.recipe_options import parse
from jaxprune.methods.quantization import off_grid
from jaxprune.run_store.store import RunStore
from jaxprune.solve import quantized_layers
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.quantized_layers import ERROR
from tests.helpers import families, tiny
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch
from tests.helpers.shapes import windows

LINE = "--sparsity 0.6 --tune-epochs 1 --tune-windows 3 --rule *.q_proj=2:4 --skip layers.1.*"


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which down_proj, with 48 inputs, comes in no whole blocks of 32, and all else
    does."""
    folder = tmp_path_factory.mktemp("blocks")
    tiny.save(folder, tiny.config())
    return folder


def by_recipe(checkpoint: Path, line: str, store: RunStore | None = None) -> list[LayerResult]:
    return list(
        prune_model(load(checkpoint), windows(), parse(line.split()), context=Context(store))
    )


def test_zeros_stay_and_all_else_is_on_the_grid(blocks: Path) -> None:
    pruned, found = by_recipe(blocks, LINE), by_recipe(blocks, f"{LINE} --quantize q4_0")
    for before, after in zip(pruned, found, strict=True):
        assert (
            before.params.keys() == after.params.keys()
            and before.masks.keys() == after.masks.keys()
        )
        for name, array in after.params.items():
            path = name.removeprefix(f"layers.{after.index}.").removesuffix(".kernel")
            if not name.endswith(".kernel") or path == "mlp.down_proj":
                np.testing.assert_array_equal(array, before.params[name], err_msg=name)
                continue
            assert not array[before.params[name] == 0].any(), name
            scales = np.abs(array).max(axis=0) / 8
            integers = array / np.where(scales > 0, scales, 1)
            np.testing.assert_allclose(integers, np.round(integers), atol=1e-6, err_msg=name)
            kernel = after[path]
            assert (
                kernel.zeros == np.count_nonzero(array == 0)
                and kernel.wanted == before[path].wanted
            )
            assert kernel.error == before[path].error and 1e-4 < kernel.stats[ERROR] < 0.03


@needs_torch
def test_kernels_of_experts_are_on_the_grid(tmp_path: Path) -> None:
    families.save(tmp_path, families.config("olmoe", "plain"))
    for layer in by_recipe(tmp_path, "--method wanda --sparsity 0.5 --quantize q4_0"):
        path = "mlp.experts.3.up_proj"
        assert (
            off_grid(layer.params[f"layers.{layer.index}.{path}.kernel"], 4) == 0
            and layer[path].stats[ERROR] > 0
        )


def test_it_is_taken_up_where_it_stopped(
    blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{LINE} --quantize q4_0"
    expected = by_recipe(blocks, line)

    def kept() -> list[LayerResult]:
        with contextlib.closing(RunStore(tmp_path)) as store:
            return by_recipe(blocks, line, store)

    with monkeypatch.context() as patch:
        patch.setattr(quantized_layers, "solve_layer", failing(quantized_layers.solve_layer, 3))
        with pytest.raises(InputError):
            kept()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", "tuned", "work-0"]
    again, third = kept(), kept()
    assert [layer.resumed for layer in again] == [True, True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", "work-0"]
    for layers in (again, third):
        for mine, theirs in zip(layers, expected, strict=True):
            assert mine.kernels == theirs.kernels
            for name, array in theirs.params.items():
                np.testing.assert_array_equal(mine.params[name], array, err_msg=name)


def test_a_gguf_file_holds_the_checkpoint_bit_for_bit(
    blocks: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = [
        "prune",
        "--ckpt",
        blocks,
        "--calib",
        text,
        *"--nsamples 4 --seqlen 64 --eval none".split(),
    ]
    assert (
        main(
            [*map(str, run), *"--pattern 2:4 --quantize q4_0 --out".split(), str(tmp_path / "out")]
        )
        == 0
    )
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "on the grid of Q4_0" in capsys.readouterr().out
    assert convert([str(tmp_path / "out"), str(tmp_path / "again.gguf"), "--type", "q8_0"]) == 0
    assert "quantized to Q4_0, and q8_0 rounds them again" in capsys.readouterr().err
    assert convert([str(tmp_path / "out"), str(tmp_path / "out.gguf")]) == 0
    assert not capsys.readouterr().err
    source, file = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "out.gguf")
    for name in source.spec:
        array = source.read([name])[name]
        if name.endswith(".kernel") and "down_proj" not in name and name.startswith("layers."):
            np.testing.assert_array_equal(file.read([name])[name], array, err_msg=name)
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    assert record["recipe"]["quantize"] == "q4_0" and record["seconds"]["quantize"] > 0
    card = (tmp_path / "out/README.md").read_text()
    assert "quantized to Q4_0" in card and "FILE.gguf --type q4_0" in card
    assert "| not quantized | 3 linear layers" in card  # the down_proj of each layer has 48 inputs
    assert (
        "Relative error of the quantization by layer" in (tmp_path / "out/report.html").read_text()
    )
    again = [
        "prune",
        "--config",
        str(tmp_path / "out/jaxprune.json"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")
    )
    assert first == second


def test_a_weight_off_the_grid_is_found(
    blocks: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = [
        "prune",
        "--ckpt",
        blocks,
        "--calib",
        text,
        *"--nsamples 2 --seqlen 64 --eval none".split(),
    ]
    line = ["--method", "magnitude", "--quantize", "q5_0", "--out", str(tmp_path / "out")]
    assert main([*map(str, run), *line]) == 0
    stored = load_file(tmp_path / "out/model.safetensors")
    kernel = stored["model.layers.1.mlp.up_proj.weight"]
    kernel[3, np.flatnonzero(kernel[3])[0]] *= 1.01
    save_file(stored, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert (
        "layers.1.mlp.up_proj.kernel has 1 weights off the grid of Q5_0" in capsys.readouterr().out
    )


def test_a_model_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.config(hidden_size=40, intermediate_size=72))
    with pytest.raises(InputError, match="blocks of 32 inputs, but no linear layer"):
        prune_model(load(tmp_path), windows(), parse("--quantize q4_0".split()))


def test_a_type_that_rounding_serves_is_refused() -> None:
    with pytest.raises(InputError, match="quantize must be q4_0 or q5_0, not 'q8_0'"):
        Recipe(quantize="q8_0")
