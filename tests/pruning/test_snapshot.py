"""A layer's snapshot in a file: it is the one that a run meets, and solving it is what the run does."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.errors import UserError
from jaxprune import ADMM, CheckpointError, InputError, Magnitude, Unstructured, load, prune_layers
from jaxprune.commands.recipe_options import parse
from jaxprune.commands.solve import main
from jaxprune.pruning import snapshot as snapshots
from jaxprune.pruning.snapshot import Snapshot, solve
from tests.helpers import tiny


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (4, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def snapshot(checkpoint: Path) -> Snapshot:
    """The last layer's, behind layers pruned by ADMM."""
    (found,) = snapshots.capture(load(checkpoint), tokens(), [2], ADMM(), Unstructured(0.6), prune_before=True)
    return found


@pytest.fixture
def file(snapshot: Snapshot, tmp_path: Path) -> Path:
    snapshots.save(tmp_path / "layer.safetensors", snapshot)
    return tmp_path / "layer.safetensors"


def test_solving_the_snapshot_is_what_the_run_does(checkpoint: Path, file: Path) -> None:
    *_, last = prune_layers(load(checkpoint), tokens(), ADMM(), Unstructured(0.6))
    solved = {p: (result, kernel) for p, result, _, kernel in solve(snapshots.load(file), parse(["--sparsity", "0.6"]))}
    assert solved.keys() == last.kernels.keys()
    for linear, (result, kernel) in solved.items():
        assert result.error == pytest.approx(last.kernels[linear].error, rel=1e-5)
        np.testing.assert_allclose(kernel, last.params[f"layers.2.{linear}.kernel"], rtol=1e-4, atol=1e-5)


def test_the_layers_before_may_stay_dense(checkpoint: Path, snapshot: Snapshot) -> None:
    model = load(checkpoint)
    dense = list(snapshots.capture(model, tokens(), [0, 2], Magnitude(), Unstructured(0.5), prune_before=False))
    assert [p.layer for p in dense] == [0, 2]
    assert not np.allclose(dense[1].grams["mlp_input"], snapshot.grams["mlp_input"], rtol=1e-2)
    (first, *_) = prune_layers(model, tokens(), Magnitude(), Unstructured(0.5))
    for linear, result, _, _ in solve(dense[0], parse("--method magnitude".split())):
        assert result.error == pytest.approx(first.kernels[linear].error, rel=1e-5)
    with pytest.raises(InputError, match="there is no layer 7: the checkpoint has 3 layers, from 0"):
        list(snapshots.capture(model, tokens(), [7], Magnitude(), Unstructured(0.5), prune_before=False))


def test_a_snapshot_comes_back_as_it_was_saved(snapshot: Snapshot, tmp_path: Path) -> None:
    half = {linear: kernel.astype(ml_dtypes.bfloat16) for linear, kernel in snapshot.kernels.items()}
    saved = snapshot._replace(kernels=half)
    snapshots.save(tmp_path / "x.safetensors", saved)
    loaded = snapshots.load(tmp_path / "x.safetensors")
    assert (loaded.layer, loaded.inputs) == (saved.layer, saved.inputs)
    for mine, other in ((loaded.grams, saved.grams), (loaded.kernels, saved.kernels)):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            np.testing.assert_array_equal(mine[name], other[name])


def test_one_linear_layer_of_a_snapshot(snapshot: Snapshot) -> None:
    one = snapshot.only("mlp.up_proj")
    assert one.inputs == {"mlp_input": ("mlp.up_proj",)}
    assert list(one.grams) == ["mlp_input"] and list(one.kernels) == ["mlp.up_proj"]
    with pytest.raises(InputError, match="no linear layer 'up': the file has self_attn.q_proj"):
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
        ("{model}", "holds no layer's snapshot"),
        ("{nan}", "mlp.down_proj: it holds NaN or infinity"),
        ("{misshapen}", "mlp.down_proj: a kernel's shape is wrong, found [44, 32]"),
        ("{file} --pattern 3:7", "divisible by 7"),
        ("{file} --mask from-file:{model}", "holds no masks"),
        ("{file} --mask from-checkpoint:{folder}/other", "the mask was made for another model"),
    ],
)
def test_bad_input_is_one_error(
    line: str, message: str, file: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    snapshot = snapshots.load(file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    bad = {"nan": snapshot.kernels["mlp.down_proj"].copy(), "misshapen": snapshot.kernels["mlp.down_proj"][:-4]}
    bad["nan"][3, 3] = np.nan
    for name, kernel in bad.items():
        snapshots.save(
            tmp_path / f"{name}.safetensors", snapshot._replace(kernels=snapshot.kernels | {"mlp.down_proj": kernel})
        )
    tiny.save(tmp_path / "other", tiny.config(hidden_size=40))
    stored = {n: t * (t > 0) for n, t in load_file(tmp_path / "other/model.safetensors").items()}
    save_file(stored, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    names = {name: tmp_path / f"{name}.safetensors" for name in bad}
    before = file.read_bytes()
    places = names | {"file": file, "folder": tmp_path, "cut": cut, "model": checkpoint / "model.safetensors"}
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
        ({"inputs": '{"mlp_input": ["mlp.up_proj", "mlp.up_proj"]}'}, "or there twice"),
        ({"inputs": '{"mlp_input": ["mlp.upper"]}'}, "mlp.upper.kernel: a tensor is missing"),
        ({"format": "something"}, "holds no layer's snapshot"),
    ],
)
def test_a_damaged_header_is_an_error(change: dict[str, str], message: str, file: Path, tmp_path: Path) -> None:
    good = {"format": snapshots.FORMAT, "layer": "0", "inputs": '{"mlp_input": ["mlp.up_proj"]}'}
    save_file(load_file(file), tmp_path / "x.safetensors", metadata=good | change)
    with pytest.raises(UserError, match=re.escape(message)):
        snapshots.load(tmp_path / "x.safetensors")
    save_file(load_file(file), tmp_path / "x.safetensors", metadata=good)
    assert list(snapshots.load(tmp_path / "x.safetensors").kernels) == ["mlp.up_proj"]


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
    assert "not positive semidefinite: pivot" in snapshots.why_no_gram((indefinite + indefinite.T) / 2)


def test_what_cannot_be_solved_is_no_result(snapshot: Snapshot) -> None:
    tap = "mlp_input"
    bad = snapshot._replace(grams=snapshot.grams | {tap: -snapshot.grams[tap]})
    with pytest.raises(InputError, match="cannot be solved, its weights come out as NaN or infinity"):
        list(solve(bad.only("mlp.up_proj"), parse(["--sparsity", "0.6"])))


def test_other_sizes(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config(num_hidden_layers=1, hidden_size=40, intermediate_size=56))
    (found,) = snapshots.capture(load(path), tokens(), [0], Magnitude(), Unstructured(0.5), prune_before=False)
    assert found.kernels["mlp.down_proj"].shape == (56, 40)
