"""A pruned checkpoint is proven from its tensors, and a broken one is found out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import create_checkpoint
from jaxprune import NM, Magnitude, Measures, Recipe, Unstructured, evaluate, load, prune_layers
from jaxprune.commands.convert import main as convert
from jaxprune.commands.prune import main as run
from jaxprune.commands.verify import main
from jaxprune.evaluation.verification import Claims, verify, zeros
from jaxprune.loop import other_params
from jaxprune.reporting import record as records
from jaxprune.reporting.record import expected
from jaxprune.reporting.recording_observer import RecordingObserver, write_record
from jaxprune.sparsity.patterns import Pattern
from tests.helpers import tiny
from tests.helpers.checkpoints import cache

PATTERNS = {
    "2:4": NM(2, 4),
    "50 %": Unstructured(0.5),
    "60 % per output": Unstructured(0.6, per_output=True),
}


def make(out: Path, dense: Path, pattern: Pattern, *, record: bool = False) -> Path:
    """Prunes by magnitude; with a record as a run leaves it."""
    model = load(dense)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    recipe = Recipe(Magnitude(), pattern)
    account = RecordingObserver({"ckpt": str(dense), "calib": "", "out": str(out)}, recipe, tokens)
    with create_checkpoint(out, model.reader.spec, model.reader.assets) as writer:
        for layer in prune_layers(model, tokens, Magnitude(), pattern):
            writer.write(layer.params)
            account.layer_done(layer)
        for paths in other_params(model.reader.spec):
            writer.write(model.reader.read(paths))
        if record:
            write_record(writer.place, account.run(), {})
    return out


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    return {
        name: make(folder / str(n), checkpoint, p, record=True)
        for n, (name, p) in enumerate(PATTERNS.items())
    }


def change(source: Path, target: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """A copy of a checkpoint whose tensors were edited."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", PATTERNS)
def test_what_was_pruned_is_verified(
    name: str, pruned: dict[str, Path], checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(pruned[name]), "--against", str(checkpoint)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "verified:" in printed and "21 linear layers, " in printed
    assert f"zeros, {name}" in printed and "9 other tensors compared with" in printed
    assert ("2:4 along the inputs (columns of the stored [out, in])" in printed) == (name == "2:4")
    wanted = expected(records.load(pruned[name]))
    counts = wanted.counts
    assert counts == wanted.wanted and wanted.total is None
    assert wanted.pattern == PATTERNS[name] and len(counts) == 21
    verdict = verify(load(pruned[name]), wanted)
    assert {which: kernel.zeros for which, kernel in verdict.kernels.items()} == counts
    assert {which: count for which, (count, _) in zeros(load(pruned[name])).items()} == counts


def test_what_is_on_the_hub_has_its_record_too(
    pruned: dict[str, Path], text: Path, hub: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(pruned["2:4"], cache(hub, "me/tiny"), dirs_exist_ok=True)
    assert main(["me/tiny"]) == 0
    said = capsys.readouterr().out
    assert "verified: me/tiny" in said and "2:4" in said and "without a record" not in said
    out = hub.with_name("evaluation")
    evaluate("me/tiny", measures=Measures([str(text)], seqlen=16, windows=1), out=out)
    measured = records.load(out)
    assert isinstance(measured, records.Evaluation) and measured.checkpoints["me/tiny"].run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_what_a_gguf_file_rounds_is_compared_as_it_rounds_it(
    kind: str,
    dtype: str,
    pruned: dict[str, Path],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def stored(folder: Path, name: str, head: float = 1.0) -> Path:
        def edit(tensors: dict[str, np.ndarray]) -> None:
            tensors |= {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
            tensors["lm_head.weight"] *= tensors["lm_head.weight"].dtype.type(head)

        return change(folder, tmp_path / name, edit)

    dense, other = stored(checkpoint, "dense"), stored(pruned["2:4"], "other", head=2.0)
    for source in (stored(pruned["2:4"], "own"), other):
        assert convert([str(source), f"{source}.gguf", "--type", kind]) == 0
    assert main([f"{tmp_path}/own.gguf", "--against", str(dense), "--pattern", "2:4"]) == 0
    assert "9 other tensors compared with" in " ".join(capsys.readouterr().out.split())
    assert main([f"{other}.gguf", "--against", str(dense)]) == 1
    assert (
        "problem: lm_head.kernel is not the dense checkpoint's, as its type rounds it"
        in capsys.readouterr().out
    )


def test_a_total_is_all_that_unequal_linears_must_have(pruned: dict[str, Path]) -> None:
    record = json.loads((pruned["50 %"] / "jaxprune.json").read_text())
    record["recipe"]["importance"]["max_deviation"] = 0.3

    def wanted(sparsity: float) -> Claims:
        record["recipe"]["pattern"]["sparsity"] = sparsity
        run = records.read(json.dumps(record), "jaxprune.json")
        assert isinstance(run, records.Run)
        return expected(run)

    size = sum(linear["size"] for layer in record["layers"] for linear in layer["kernels"].values())
    assert wanted(0.5).pattern is None and wanted(0.5).total == size // 2
    model = load(pruned["50 %"])
    assert verify(model, wanted(0.5)).problems == []
    (problem,) = verify(model, wanted(0.5 + 1 / size)).problems
    assert problem == f"the kernels have {size // 2} zeros in total, 1 fewer than were wanted"


def test_a_sparsity_of_seven_digits_is_verified(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """512 × 1024 weights at 0.6666667 have one zero less than at the 0.666667 of six digits."""
    size = 512 * 1024
    assert round(0.6666667 * size) == round(float(f"{0.6666667:g}") * size) - 1
    dense = tiny.save(
        tmp_path / "dense",
        tiny.config(hidden_size=512, intermediate_size=1024, num_hidden_layers=1),
    )
    flags = ["--ckpt", dense, "--calib", text, "--nsamples", 1, "--seqlen", 8, "--eval", "none"]
    flags += ["--method", "magnitude", "--sparsity", 0.6666667, "--out", tmp_path / "out"]
    assert run(list(map(str, flags))) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--against", str(dense)]) == 0
    assert "zeros, 66.66667 %, 5 other tensors" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    assert record["recipe"]["pattern"] == {"sparsity": 0.6666667, "per_output": False}
    linear = record["layers"][0]["kernels"]["mlp.up_proj"]
    assert linear["wanted"] == linear["zeros"] == round(0.6666667 * size)
    name = "model.layers.0.mlp.up_proj.weight"

    def revive(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][tuple(np.argwhere(tensors[name] == 0)[0])] = 1.0

    assert main([str(change(tmp_path / "out", tmp_path / "broken", revive))]) == 1
    assert (
        f"has {linear['zeros'] - 1} zeros, 1 fewer than were wanted of {size} weights"
        in capsys.readouterr().out
    )


def test_a_record_of_another_checkpoint_is_noticed(pruned: dict[str, Path]) -> None:
    wanted = expected(records.load(pruned["50 %"]))
    counts = wanted.counts
    counts[3, "mlp.up_proj"] = counts.pop((1, "mlp.up_proj"))
    assert verify(load(pruned["50 %"]), wanted).problems == [
        "layers.1.mlp.up_proj.kernel is not in the record",
        "layers.3.mlp.up_proj.kernel is missing: the record has it",
    ]


def test_a_record_is_not_needed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = make(tmp_path / "pruned", checkpoint, NM(2, 4))
    assert not (folder / "jaxprune.json").exists()
    for file in folder.glob("*token*"):
        file.unlink()
    assert main([str(folder), "--pattern", "2:4", "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("2:4 along inputs") == 21 and "there is no tokenizer" in out
    assert main([str(folder), "--pattern", "1:4"]) == 1
    assert main([str(folder), "--sparsity", "0.5"]) == 0
    assert main([str(folder), "--sparsity", "0.6"]) == 1
    assert "fewer than 60 %" in capsys.readouterr().out
    assert main([str(checkpoint)]) == 0
    assert main([str(checkpoint), "--pattern", "2:4"]) == 1


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def resurrect(tensors: dict[str, np.ndarray]) -> None:
    row, column = np.argwhere(tensors[UP] == 0)[5]
    tensors[UP][row, column] = 0.25


def transpose_groups(tensors: dict[str, np.ndarray]) -> None:
    """2:4 along the stored rows instead of the columns."""
    kernel = np.ones_like(tensors[UP])
    kernel.reshape(-1, 4, kernel.shape[1])[:, :2] = 0
    tensors[UP] = kernel


def spoil(tensors: dict[str, np.ndarray]) -> None:
    """Makes one kept weight NaN, so that the pattern still holds."""
    row, column = np.argwhere(tensors[UP])[5]
    tensors[UP][row, column] = float("nan")


BROKEN: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "a weight came back": (
        resurrect,
        "layers.1.mlp.up_proj.kernel is not 2:4 along its inputs: 1 groups keep more than 2, the "
        "first at inputs",
    ),
    "groups along the outputs": (
        transpose_groups,
        "it is 2:4 along the outputs instead, as if transposed",
    ),
    "a norm changed": (
        lambda tensors: np.add.at(tensors[NORM].view(np.int32), 3, 1),
        "layers.2.input_layernorm.scale is not the dense checkpoint's, bit for bit",
    ),
    "nan": (
        spoil,
        "layers.1.mlp.up_proj.kernel holds 1 values that are NaN or infinite",
    ),
    "infinity": (
        lambda tensors: tensors[EMBEDDING][7].fill(np.inf),
        "embed_tokens.embedding holds 32 values that are NaN or infinite",
    ),
    "more zeros than were made": (
        lambda tensors: tensors[UP][0].fill(0),
        "zeros, not 768 as the record says",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(
    name: str,
    pruned: dict[str, Path],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    edit, message = BROKEN[name]
    folder = change(pruned["2:4"], tmp_path / "broken", edit)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([str(folder), "--against", str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert message in printed and "not verified" in printed
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_outlier_is_found_without_a_record(
    pruned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = change(pruned["2:4"], tmp_path / "broken", resurrect)
    (folder / "jaxprune.json").unlink()
    assert main([str(folder)]) == 1
    assert (
        "layers.1.mlp.up_proj.kernel is not 2:4 along its inputs, as 20 others are"
        in capsys.readouterr().out
    )
    assert verify(load(folder), Claims(total=1)).problems == []  # only a sparsity is claimed


def test_a_linear_that_stays_dense_is_the_dense_one(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--ckpt", checkpoint, "--calib", text, *"--nsamples 1 --seqlen 8 --eval none".split()]
    flags += ["--method", "magnitude", "--skip", "*.up_proj", "--out", tmp_path / "out"]
    assert run(list(map(str, flags))) == 0
    assert main([str(tmp_path / "out"), "--against", str(checkpoint)]) == 0
    assert "12 other tensors compared with" in " ".join(capsys.readouterr().out.split())
    folder = change(
        tmp_path / "out",
        tmp_path / "broken",
        lambda tensors: np.multiply(tensors[UP], 2, tensors[UP]),
    )
    assert main([str(folder), "--against", str(checkpoint)]) == 1
    assert (
        "layers.1.mlp.up_proj.kernel is not the dense checkpoint's, bit for bit"
        in capsys.readouterr().out
    )


def test_a_wrong_output_is_named(
    pruned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = change(
        pruned["60 % per output"], tmp_path / "broken", lambda tensors: tensors[UP][7].fill(1)
    )
    assert main([str(folder)]) == 1
    assert "has fewer than 19 zeros in 1 outputs, the first of them 7" in capsys.readouterr().out


def test_tensors_that_are_not_the_dense_ones(
    pruned: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    def halve(tensors: dict[str, np.ndarray]) -> None:
        tensors[NORM] = (tensors[NORM] * np.float32(1.0001)).astype(np.float16)

    name, half = "layers.2.input_layernorm.scale", change(checkpoint, tmp_path / "half", halve)
    problems = verify(load(pruned["50 %"]), against=load(half)).problems
    assert problems == [f"{name} is not the dense checkpoint's, rounded to float32"]
    mixed = change(pruned["50 %"], tmp_path / "mixed", halve)
    problems = verify(load(mixed), against=load(checkpoint)).problems
    assert f"{name} is float16[32], the dense checkpoint's float32[32]" in problems


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_what_cannot_be_read_is_one_error(
    missing: str, pruned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(pruned["50 %"], tmp_path / "broken")
    (tmp_path / "broken" / missing).unlink()
    assert main([str(tmp_path / "broken")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_n_of_m_is_found_on_both_axes(
    pruned: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    assert {kernel.found for kernel in verify(load(checkpoint)).kernels.values()} == {()}
    kernels = verify(load(change(pruned["2:4"], tmp_path / "changed", transpose_groups))).kernels
    assert kernels[1, "mlp.up_proj"].found == ((2, 4, "outputs"),)
    assert kernels[1, "mlp.gate_proj"].found == ((2, 4, "inputs"),)


def test_zeros_that_a_fine_tuning_lost_are_counted(
    pruned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, name = pruned["50 %"], "model.layers.1.mlp.up_proj.weight"

    def tune(tensors: dict[str, np.ndarray]) -> None:
        for tensor in tensors.values():
            tensor *= np.float32(1.1)

    def lose(tensors: dict[str, np.ndarray]) -> None:
        zeros = np.flatnonzero(tensors[name] == 0)[:3]
        tensors[name].reshape(-1)[zeros] = 1e-30

    tuned = change(source, tmp_path / "tuned", tune)
    assert main([str(tuned), "--zeros-of", str(source)]) == 0
    lost = change(tuned, tmp_path / "lost", lose)
    (lost / "jaxprune.json").unlink()
    capsys.readouterr()
    assert main([str(lost), "--zeros-of", str(source)]) == 1
    assert "layers.1.mlp.up_proj.kernel has 3 weights where there were zeros" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_packed_checkpoint_is_verified_by_its_record(
    pruned: dict[str, Path], tmp_path: Path
) -> None:
    assert convert([str(pruned["50 %"]), str(tmp_path / "packed"), "--to", "packed"]) == 0
    assert records.run_of(str(tmp_path / "packed"))
    assert main([str(tmp_path / "packed")]) == 0
