"""A layer's snapshot in a file: it is the one that a run meets, and solving it is what the run
does."""

import dataclasses
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert.errors import UserError
from jaxprune import (
    ADMM,
    NM,
    CheckpointError,
    Context,
    InputError,
    Magnitude,
    Observer,
    Recipe,
    Unstructured,
    load,
    prune_layers,
    prune_model,
)
from jaxprune.api import snapshot as snapshots
from jaxprune.api.snapshot import Snapshot, solve
from jaxprune.commands.recipe_options import parse
from jaxprune.commands.solve import main
from jaxprune.recipe_parts import Rule
from jaxprune.solve.layer_result import LayerResult
from jaxprune.sparsity.patterns import partly
from jaxprune.structure.experts import kept_experts
from tests.helpers import families, tiny


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (4, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def snapshot(checkpoint: Path) -> Snapshot:
    """The last layer's, after layers pruned by ADMM."""
    return snapshots.capture(load(checkpoint), tokens(), 2, Recipe(ADMM(), Unstructured(0.6)))


@pytest.fixture
def file(snapshot: Snapshot, tmp_path: Path) -> Path:
    snapshots.save(tmp_path / "layer.safetensors", snapshot)
    return tmp_path / "layer.safetensors"


class Pruned(Observer):
    """Saves the layers as they are before any tuning."""

    def __init__(self) -> None:
        self.layers: list[LayerResult] = []

    def layer_done(self, result: LayerResult) -> None:
        self.layers.append(result)


def assert_solved_as_in_the_run(folder: Path, line: str, layer: int, file: Path) -> Snapshot:
    """Compares a layer of a run, before its tuning, with its snapshot solved by the run's method
    and patterns."""
    recipe, run = parse(line.split()), Pruned()
    model, smaller = load(folder), load(folder)
    if recipe.structure.drop_experts:
        smaller = model.keeping(kept_experts(model, tokens(), recipe.structure.drop_experts))
    for _ in prune_model(smaller, tokens(), recipe, context=Context(observer=run)):
        pass
    snapshots.save(file, snapshots.capture(model, tokens(), layer, recipe))
    found = snapshots.load(file)
    every = solve(found, recipe.method, lambda index, path: found.patterns[path])
    solved = {path: (result, kernel) for path, result, _, kernel in every}
    expected = run.layers[layer]
    assert solved.keys() == {path for path, kernel in expected.kernels.items() if kernel.wanted}
    for path, (result, kernel) in solved.items():
        assert result == expected[path], path
        assert kernel.tobytes() == expected.params[f"layers.{layer}.{path}.kernel"].tobytes(), path
    return found


@pytest.mark.parametrize(
    "line",
    [
        "--sparsity 0.6",
        "--sparsity 0.8 --tune-epochs 0.5 --tune-gradual 0.5",
        "--preset fast --sparsity 0.7",
        "--preset best --sparsity 0.7 --tune-epochs 0.5",
        "--mask wanda --pattern 2:4 --token-power 0.5 --weigh-outputs",
        "--asymmetry 0.5 --quantize q4_0",
        "--asymmetry 0.5 --skip layers.0.*",
        "--sparsity 0.6 --max-deviation 0.2 --rule layers.1.*=0.8 --rule layers.2.*_proj=1:4 "
        "--skip *.o_proj",
    ],
)
def test_solving_the_snapshot_is_what_the_run_does(
    line: str, checkpoint: Path, tmp_path: Path
) -> None:
    assert_solved_as_in_the_run(checkpoint, line, 2, tmp_path / "layer.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        "--sparsity 0.6 --drop-experts 0.34 --weigh-outputs",
        "--mask wanda --update exact --route-all",
        "--sparsity 0.6 --rule *.mlp.gate=0.5",
    ],
)
def test_solving_the_snapshot_of_a_layer_with_experts_is_what_the_run_does(
    line: str, tmp_path: Path
) -> None:
    families.save(tmp_path / "dense", families.config("qwen3_moe", "mixed"))
    found = assert_solved_as_in_the_run(tmp_path / "dense", line, 2, tmp_path / "layer.safetensors")
    assert found.tokens.keys() == {
        capture for capture in found.inputs if capture.startswith("expert_")
    }
    assert found.tokens and ("mlp.gate" in found.kernels) == ("--rule" in line)


def test_the_run_decides_the_patterns_of_a_snapshot(checkpoint: Path) -> None:
    model = load(checkpoint)

    def sparsities(line: str) -> set[float]:
        found = snapshots.capture(model, tokens(), 0, parse(line.split()))
        solved = solve(found, Magnitude(), lambda index, path: found.patterns[path])
        return {result.zeros / result.size for _, result, _, _ in solved}

    assert sparsities("--sparsity 0.75") == {0.75}
    assert sparsities("--sparsity 0.75 --tune-epochs 1 --tune-gradual 1") == {0.5}
    assert len(sparsities("--preset fast")) > 1


def test_the_layers_before_may_stay_dense(checkpoint: Path, snapshot: Snapshot) -> None:
    model, recipe = load(checkpoint), Recipe(Magnitude(), Unstructured(0.5))
    first, last = (
        snapshots.capture(model, tokens(), layer, recipe, prune_before=False) for layer in (0, 2)
    )
    assert (first.layer, last.layer) == (0, 2)
    assert not np.allclose(last.grams["mlp_input"], snapshot.grams["mlp_input"], rtol=1e-2)
    pruned = next(prune_layers(model, tokens(), Magnitude(), Unstructured(0.5)))
    for linear, result, _, _ in solve(first, recipe.method, recipe.target()):
        assert result == pruned[linear]
    shifting = dataclasses.replace(recipe, asymmetry=0.5)
    moved = snapshots.capture(model, tokens(), 2, shifting, prune_before=False)
    assert moved.shifts.keys() == moved.grams.keys() and not any(
        shift.any() for shift in moved.shifts.values()
    )


def test_a_layer_that_has_no_snapshot(checkpoint: Path) -> None:
    model = load(checkpoint)
    with pytest.raises(
        InputError, match="there is no layer 7: the checkpoint has 3 layers, from 0"
    ):
        snapshots.capture(model, tokens(), 7, Recipe())
    with pytest.raises(InputError, match="the rules leave layer 1 dense"):
        snapshots.capture(model, tokens(), 1, Recipe(rules=(Rule("layers.1.*"),)))


def test_a_snapshot_comes_back_as_it_was_saved(snapshot: Snapshot, tmp_path: Path) -> None:
    half = {
        linear: kernel.astype(ml_dtypes.bfloat16) for linear, kernel in snapshot.kernels.items()
    }
    saved = snapshot._replace(
        kernels=half,
        patterns=snapshot.patterns
        | {"mlp.up_proj": NM(2, 4), "mlp.gate_proj": partly(Unstructured(0.7), 0.1)},
        outputs={
            linear: np.arange(1, kernel.shape[1] + 1, dtype=np.float32)
            for linear, kernel in half.items()
        },
        tokens={"mlp_input": 3},
        shifts={capture: -gram for capture, gram in snapshot.grams.items()},
        asymmetry=0.1,
    )
    snapshots.save(tmp_path / "x.safetensors", saved)
    loaded = snapshots.load(tmp_path / "x.safetensors")
    for name, mine in loaded._asdict().items():
        other = getattr(saved, name)
        if name not in ("grams", "kernels", "outputs", "shifts"):
            assert mine == other, name
            continue
        assert mine.keys() == other.keys(), name
        for key in mine:
            assert mine[key].dtype == other[key].dtype
            np.testing.assert_array_equal(mine[key], other[key])
    one = loaded.only("mlp.up_proj")
    assert one.inputs == {"mlp_input": ("mlp.up_proj",)} and one.patterns == {
        "mlp.up_proj": NM(2, 4)
    }
    assert one.outputs.keys() == one.kernels.keys() and one.shifts.keys() == one.tokens.keys() == {
        "mlp_input"
    }


def test_one_linear_layer_of_a_snapshot(snapshot: Snapshot) -> None:
    one = snapshot.only("mlp.up_proj")
    assert one.inputs == {"mlp_input": ("mlp.up_proj",)}
    assert list(one.grams) == ["mlp_input"] and list(one.kernels) == ["mlp.up_proj"]
    with pytest.raises(InputError, match="no linear layer 'up': the snapshot has self_attn.q_proj"):
        snapshot.only("up")


def test_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "pruned.safetensors"
    line = f"{file} --mask wanda --update exact --pattern 2:4 --out {out}"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "layer 2, wanda mask, exact update, 2:4"
    assert len(printed) == 2 + 7
    assert all("50.00 %" in row and "cg_residual" in row for row in printed[2:])
    for kernel in snapshots.load(out).kernels.values():
        assert ((kernel != 0).reshape(-1, 4, kernel.shape[1]).sum(axis=1) == 2).all()
    assert main([str(file), "--linear", "mlp.down_proj", "--method", "alps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{file} --out {file}", "it is also what is given as the file: choose another --out"),
        ("{file} --linear mlp.side_proj", "no linear layer 'mlp.side_proj'"),
        ("{folder}/missing.safetensors", "it is missing"),
        ("{cut}", "it cannot be read"),
        ("{model}", "is not a layer's snapshot"),
        ("{nan}", "mlp.down_proj.kernel: it has NaN or infinite values"),
        ("{misshapen}", "mlp.down_proj: a kernel's shape is wrong, found [44, 32]"),
        ("{file} --pattern 3:7", "divisible by 7"),
        ("{file} --mask from-file:{model}", "has no masks"),
        ("{file} --mask from-checkpoint:{folder}/other", "the mask was made for another model"),
    ],
)
def test_bad_input_is_one_error(
    line: str,
    message: str,
    file: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    snapshot = snapshots.load(file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    bad = {
        "nan": snapshot.kernels["mlp.down_proj"].copy(),
        "misshapen": snapshot.kernels["mlp.down_proj"][:-4],
    }
    bad["nan"][3, 3] = np.nan
    for name, kernel in bad.items():
        snapshots.save(
            tmp_path / f"{name}.safetensors",
            snapshot._replace(kernels=snapshot.kernels | {"mlp.down_proj": kernel}),
        )
    tiny.save(tmp_path / "other", tiny.config(hidden_size=40))
    stored = {n: t * (t > 0) for n, t in load_file(tmp_path / "other/model.safetensors").items()}
    save_file(stored, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    names = {name: tmp_path / f"{name}.safetensors" for name in bad}
    before = file.read_bytes()
    places = names | {
        "file": file,
        "folder": tmp_path,
        "cut": cut,
        "model": checkpoint / "model.safetensors",
    }
    capsys.readouterr()  # transformers' progress bar
    assert main(line.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) <= 3
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "x"}, "__metadata__.layer: an entry cannot be used, found 'x'"),
        ({"layer": "9" * 5000}, "__metadata__.layer: an entry cannot be used"),
        ({"inputs": "[1"}, "__metadata__.inputs"),
        ({"inputs": "[1]"}, "__metadata__.inputs"),
        ({"inputs": "{}"}, "linear layers are missing"),
        ({"inputs": '{"mlp_input": ["mlp.up_proj", "mlp.up_proj"]}'}, "missing or duplicated"),
        ({"inputs": '{"mlp_input": ["mlp.upper"]}'}, "mlp.upper.kernel: a tensor is missing"),
        ({"format": "something"}, "is not a layer's snapshot"),
        ({"format": "jaxprune layer 1"}, "is not a layer's snapshot"),
        (
            {"patterns": '{"mlp.gate_proj": {"pattern": {"n": 2, "m": 4}, "share": 1}}'},
            "or unknown",
        ),
        (
            {"patterns": '{"mlp.up_proj": {"pattern": {"n": 2, "m": 5}, "share": 1}}'},
            "divisible by 5",
        ),
        (
            {"patterns": '{"mlp.up_proj": {"pattern": {"n": 2, "m": 4}, "share": 2}}'},
            "patterns",
        ),
        (
            {"patterns": '{"mlp.up_proj": {"pattern": {"mask": "x"}, "share": 1}}'},
            "patterns",
        ),
        ({"tokens": '{"mlp_output": 3}'}, "tokens: unknown inputs, found ['mlp_output']"),
        ({"tokens": '{"mlp_input": -3}'}, "tokens"),
        ({"asymmetry": "1.5"}, "asymmetry"),
        ({"asymmetry": "NaN"}, "asymmetry"),
        ({"asymmetry": "0.5"}, "shift.mlp_input: a tensor is missing"),
    ],
)
def test_a_damaged_header_is_an_error(
    change: dict[str, str], message: str, file: Path, tmp_path: Path
) -> None:
    good = {"format": snapshots.FORMAT, "layer": "0", "inputs": '{"mlp_input": ["mlp.up_proj"]}'}
    save_file(load_file(file), tmp_path / "x.safetensors", metadata=good | change)
    with pytest.raises(UserError, match=re.escape(message)):
        snapshots.load(tmp_path / "x.safetensors")
    save_file(load_file(file), tmp_path / "x.safetensors", metadata=good)
    assert list(snapshots.load(tmp_path / "x.safetensors").kernels) == ["mlp.up_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"outputs.mlp.up_proj": np.ones(47, np.float32)},
            "the number of weights is wrong, found [47], wanted [48]",
        ),
        ({"outputs.mlp.up_proj": np.ones(48, np.float16)}, "a tensor's dtype is not supported"),
        (
            {"outputs.mlp.up_proj": np.zeros(48, np.float32)},
            "an output weight is not positive",
        ),
        (
            {"outputs.mlp.up_proj": np.full(48, np.nan, np.float32)},
            "outputs.mlp.up_proj: it has NaN or infinite values",
        ),
        ({"outputs.mlp.up_proj": None}, "outputs.mlp.up_proj: a tensor is missing"),
        (
            {"shift.mlp_input": np.ones((32, 31), np.float32)},
            "shift.mlp_input: its shape is wrong, found [32, 31], wanted [32, 32]",
        ),
        (
            {"shift.mlp_input": np.full((32, 32), np.inf, np.float32)},
            "shift.mlp_input: it has NaN or infinite values",
        ),
    ],
)
def test_damaged_weights_and_shifts_are_an_error(
    change: dict[str, np.ndarray | None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = parse(["--weigh-outputs", "--asymmetry", "0.5"])
    file = tmp_path / "layer.safetensors"
    snapshots.save(file, snapshots.capture(load(checkpoint), tokens(), 0, recipe))
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    arrays = {
        name: array for name, array in (load_file(file) | change).items() if array is not None
    }
    save_file(arrays, file, metadata=metadata)
    with pytest.raises(UserError, match=re.escape(message)):
        snapshots.load(file)


def test_a_file_is_not_replaced_unasked(file: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        snapshots.save(file, snapshots.load(file))


@pytest.mark.parametrize("n", [1, 3, 64, 300])
def test_what_a_gram_matrix_is(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.standard_normal((max(1, n // 2), n)).astype(ml_dtypes.bfloat16).astype(np.float32)
    x[:, : n // 3] = 0  # dead inputs, beside a matrix of half its rank
    gram = x.T @ (x * generator.uniform(1e-3, 1e3, (len(x), 1)).astype(np.float32))
    gram = (gram + gram.T) / 2
    assert snapshots.why_no_gram(gram) == ""
    scale = np.geomspace(1e-6, 1e6, n, dtype=np.float32)
    assert snapshots.why_no_gram(gram * scale[:, None] * scale[None, :]) == ""


def test_what_a_gram_matrix_is_not() -> None:
    x = np.random.default_rng(0).standard_normal((100, 40)).astype(np.float32)
    gram = x.T @ x
    for change, message in (
        ((5, 5, -1.0), "its diagonal is negative at 5: -1"),
        ((5, 6, gram[5, 6] + 1), r"it is not symmetric at \[5, 6\]|at \[6, 5\]"),
    ):
        row, column, value = change
        bad = gram.copy()
        bad[row, column] = value
        assert re.match(message, snapshots.why_no_gram(bad))
    larger = gram.copy()
    larger[3, 7] = larger[7, 3] = 1000
    assert snapshots.why_no_gram(larger) == "its entry [3, 7] is larger than the diagonal allows"
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    values[0] = -0.5 * values[-1]
    indefinite = np.float32(vectors * values @ vectors.T)
    assert snapshots.why_no_gram((indefinite + indefinite.T) / 2)
    values[0] = -2e-2 * values[-1]
    indefinite = np.float32(vectors * values @ vectors.T)
    assert "not positive semidefinite: pivot" in snapshots.why_no_gram(
        (indefinite + indefinite.T) / 2
    )


def test_what_cannot_be_solved_is_no_result(snapshot: Snapshot) -> None:
    capture = "mlp_input"
    bad = snapshot._replace(grams=snapshot.grams | {capture: -snapshot.grams[capture]})
    with pytest.raises(InputError, match="cannot be solved: its weights would be NaN or infinite"):
        list(solve(bad.only("mlp.up_proj"), ADMM(), Unstructured(0.6)))


def test_other_sizes(tmp_path: Path) -> None:
    path = tiny.save(
        tmp_path, tiny.config(num_hidden_layers=1, hidden_size=40, intermediate_size=56)
    )
    found = snapshots.capture(load(path), tokens(), 0, Recipe())
    assert found.kernels["mlp.down_proj"].shape == (56, 40)
