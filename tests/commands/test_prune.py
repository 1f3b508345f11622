"""The command line from end to end, in processes of its own, as a user runs it."""

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import open_checkpoint
from jaxprune import TextStream, load
from jaxprune.commands.prune import main
from jaxprune.commands.report import main as report_main
from jaxprune.commands.verify import main as verify
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.reporting import report
from jaxprune.sparsity.masks import from_file
from tests.helpers import tiny
from tests.helpers.command import jaxprune
from tests.helpers.optional import needs_torch, torch


def here(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    """The same in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, args)])
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(
    checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A finished run's folder and what it printed."""
    cwd = tmp_path_factory.mktemp("run")
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 6 --seqlen 64 --eval-text".split(),
        text,
    ]
    done = jaxprune(*options, "--eval-windows", 5, "--out", "out", "--seed", 3, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return cwd / "out", done.stdout


def test_it_prints_a_line_a_layer_and_a_table(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for number in (1, 2, 3):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"layer {number}/3"))
        assert all(
            word in line
            for word in ("error %", "gate", "down", "sparsity 50.00 %", "gram", "solve")
        )
    rows = (
        "perplexity of",
        "perplexity over the dense model's",
        "KL divergence from the dense model",
        "same most probable token",
        "sparsity of the linear layers",
        "time, total",
        "peak memory, host",
        "result",
    )
    for row in rows:
        assert row in printed, row


@needs_torch
def test_the_result_is_a_hugging_face_checkpoint(
    finished: tuple[Path, str], checkpoint: Path
) -> None:
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.dtype == torch.float32
    dense = load_file(checkpoint / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if "_proj" in name:
            assert int((tensor == 0).sum()) == tensor.numel() // 2, name
        else:
            np.testing.assert_array_equal(tensor, dense[name], name)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The cat sat on", return_tensors="pt")
    assert (
        model.generate(**ids, max_new_tokens=5, do_sample=False).shape[1]
        > ids["input_ids"].shape[1]
    )


def test_the_record_repeats_what_happened(finished: tuple[Path, str]) -> None:
    out, printed = finished
    record = json.loads((out / "jaxprune.json").read_text())
    assert record["config"]["seed"] == 3
    assert record["schema"] == 3
    assert record["recipe"]["pattern"] == {"sparsity": 0.5, "per_output": False}
    assert record["recipe"]["method"] == {
        "name": "admm",
        "options": {
            "schedule": "cubic",
            "iterations": 20,
            "selections": 15,
            "damping": 0.1,
            "rho": 1.0,
            "linear_solve": "inverse",
        },
    }
    assert record["sparsity"] == 0.5
    assert len(record["layers"]) == 3
    assert record["calibration"]["windows"] == [6, 64]
    assert len(record["calibration"]["sha256"]) == 64
    assert {"jax", "flax", "python", "jaxprune"} <= record["versions"].keys()
    measured = {which: found["texts"] for which, found in record["evaluation"].items()}
    (text,) = measured["pruned"]
    assert f"{measured['pruned'][text]['perplexity']:.7g}" in printed
    assert measured["pruned"][text]["windows"] == [5, 64]
    assert measured["dense"][text]["perplexity"] * measured["pruned"][text][
        "ratio"
    ] == pytest.approx(measured["pruned"][text]["perplexity"])
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert record["seconds"]["total"] > record["seconds"]["solve"] > 0
    tokens = np.zeros((1, 8), np.int32)
    assert perplexity(load(out), tokens) != perplexity(load(record["config"]["ckpt"]), tokens)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "admm" in card and "| dense | pruned |" in card


def test_what_is_tuned_on_may_be_another_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    tiny.write_text(own, documents=40)
    line = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--method magnitude --nsamples 4 --seqlen 32".split(),
    ]
    line += ["--tune-tokens", 64, "--eval", "none"]
    found = {}
    for name, given in (("with", ["--tune-text", own]), ("without", [])):
        done = here(*line, *given, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (f"tuning {own}" in done.stdout) == (name == "with")
        found[name] = json.loads((tmp_path / name / "jaxprune.json").read_text())
    tokenizer = load(checkpoint).tokenizer
    for name, source in (("with", own), ("without", text)):
        assert found[name]["tuning_text"]["sha256"] == TextStream(str(source), tokenizer, 32).digest
        assert [tokens for tokens, _ in found[name]["divergences"]] == [0, 32, 64]
    assert found["with"]["calibration"] == found["without"]["calibration"]
    assert (
        f"| text of the tuning | {tmp_path.name}/own |"
        in (tmp_path / "with" / "README.md").read_text()
    )
    done = here(*line, "--tune-text", own, "--out", own / "out", cwd=tmp_path)
    assert done.returncode == 2 and own.is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(
    finished: tuple[Path, str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out, _ = finished
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 6 --seqlen 64 --eval none".split(),
    ]
    assert jaxprune(*options, "--out", "again", "--seed", 3, cwd=tmp_path).returncode == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
    assert "perplexity" not in (tmp_path / "again/README.md").read_text()


def test_a_report_that_cannot_be_drawn_costs_nothing_else(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A defect of ours in the drawing: the result is published, then told; drawing it again needs
    the record only."""
    monkeypatch.setattr(report, "page", lambda records: 1 // 0)
    out = tmp_path / "$x_{|_%"
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 2 --seqlen 16 --eval none".split(),
    ]
    assert main([*map(str, options), "--method", "magnitude", "--out", str(out)]) == 70
    said = capsys.readouterr()
    assert (
        "ZeroDivisionError" in said.err
        and "please report it" in said.err
        and "│ result" in said.out
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert {"jaxprune.json", "README.md", "model.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    monkeypatch.undo()
    assert verify([str(out), "--against", str(checkpoint)]) == 0
    assert report_main([str(out), "--out", str(tmp_path / "page.html")]) == 0


def test_two_of_four_with_another_methods_mask(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 4 --seqlen 32 --eval none".split(),
    ]
    done = here(*options, "--mask", "wanda", "--pattern", "2:4", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        if "_proj" in name:
            groups = (tensor != 0).reshape(tensor.shape[0], -1, 4).sum(axis=2)
            assert (groups == 2).all(), name
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    assert record["recipe"]["pattern"] == {"n": 2, "m": 4}
    method = record["recipe"]["method"]
    assert (method["mask"]["name"], method["update"]["name"]) == ("wanda", "admm")


def test_the_best_preset(
    finished: tuple[Path, str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 6 --seqlen 64 --eval-text".split(),
        text,
    ]
    options += ["--eval-windows", 5, "--seed", 3]
    done = here(
        *options,
        "--preset",
        "best",
        "--save-masks",
        "masks.safetensors",
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "tuning, steps 10 to 12 of 12: KL divergence" in done.stdout
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    assert record["recipe"]["preset"] == "best" and record["recipe"]["method"]["name"] == "admm"
    assert (
        record["recipe"]["importance"]["weigh_outputs"]
        and record["recipe"]["tuning"]["tune_epochs"] > 0
    )
    assert {"sensitivity", "gram", "solve", "forward", "tune"} <= record["seconds"].keys()
    linears = [linear for layer in record["layers"] for linear in layer["kernels"].values()]
    assert 2 * sum(linear["zeros"] for linear in linears) == sum(
        linear["size"] for linear in linears
    )
    assert len({linear["zeros"] / linear["size"] for linear in linears}) > 3
    assert verify([str(tmp_path / "out"), "--against", str(checkpoint)]) == 0
    masks = from_file(tmp_path / "masks.safetensors")
    reader = open_checkpoint(tmp_path / "out")
    name = "layers.1.mlp.down_proj.kernel"
    np.testing.assert_array_equal(masks(1, "mlp.down_proj").read(), reader.read([name])[name] != 0)
    plain = json.loads((finished[0] / "jaxprune.json").read_text())

    def divergence(record: dict) -> float:
        (measured,) = record["evaluation"]["pruned"]["texts"].values()
        return measured["kl"]

    assert divergence(record) < 0.9 * divergence(plain)


@pytest.mark.slow
def test_masks_are_saved_and_taken_up_again(
    finished: tuple[Path, str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """Another method's masks, by file and by checkpoint: the same zeros, and an error at or below
    the original's."""
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 6 --seqlen 64 --eval none".split(),
    ]
    options += ["--seed", 3]
    done = here(
        *options,
        "--out",
        "first",
        "--method",
        "sparsegpt",
        "--save-masks",
        "m.safetensors",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    sources = {"by-file": "from-file:m.safetensors", "by-checkpoint": "from-checkpoint:first"}
    first = load_file(tmp_path / "first/model.safetensors")
    errors = {}
    for out, mask in sources.items():
        done = here(*options, "--out", out, "--mask", mask, "--update", "exact", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for name, tensor in load_file(tmp_path / out / "model.safetensors").items():
            if "_proj" in name:
                np.testing.assert_array_equal(tensor == 0, first[name] == 0, name)
        record = json.loads((tmp_path / out / "jaxprune.json").read_text())
        assert record["recipe"]["pattern"] == {"mask": mask}
        assert mask in (tmp_path / out / "README.md").read_text()
        errors[out] = [x["error"] for layer in record["layers"] for x in layer["kernels"].values()]
    assert errors["by-file"] == errors["by-checkpoint"]
    record = json.loads((tmp_path / "first/jaxprune.json").read_text())
    before = [x["error"] for layer in record["layers"] for x in layer["kernels"].values()]
    # The first layer's inputs are the same in both runs; after it each run has its own.
    assert all(after <= x for after, x in zip(errors["by-file"][:7], before[:7], strict=True))
    assert sum(errors["by-file"]) <= sum(before)
    again = here(*options, "--out", "second", "--save-masks", "m.safetensors", cwd=tmp_path)
    assert again.returncode == 2 and "m.safetensors: it already exists" in again.stderr
    assert not (tmp_path / "second").exists()


def bad_input(name: str, checkpoint: Path, text: Path, folder: Path) -> list[object]:
    """A command line with one thing wrong."""
    options: dict[str, object] = {
        "--ckpt": checkpoint,
        "--calib": text,
        "--nsamples": 4,
        "--seqlen": 32,
        "--eval": "none",
        "--out": folder / "out",
    }
    if name == "existing output":
        (folder / "out").mkdir()
        (folder / "out" / "precious").write_text("kept")
    elif name == "unknown checkpoint":
        options["--ckpt"] = "lama-7b"
    elif name == "unreachable hub":
        options["--ckpt"] = "nobody/nothing"
    elif name == "impossible pattern":
        options["--pattern"] = "3:7"
    elif name == "too little text":
        options["--nsamples"] = 5000
    elif name == "window too long":
        np.save(folder / "ids.npy", np.zeros((4, 2000), np.int32))
        options |= {"--seqlen": 2000, "--calib": folder / "ids.npy"}
    elif name == "nan":
        stored = load_file(checkpoint / "model.safetensors")
        stored["model.layers.2.self_attn.o_proj.weight"][3, 3] = float("nan")
        tiny.save(folder / "nan", tiny.config())
        save_file(stored, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
        options["--ckpt"] = folder / "nan"
    elif name == "truncated":
        tiny.save(folder / "cut", tiny.config())
        file = folder / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        options["--ckpt"] = folder / "cut"
    elif name == "no tokenizer":
        for file in tiny.save(folder / "bare", tiny.config()).glob("tokenizer*"):
            file.unlink()
        options["--ckpt"] = folder / "bare"
    elif name == "dense mask":
        options["--mask"] = f"from-checkpoint:{checkpoint}"
    elif name == "mask of another model":
        tiny.save(folder / "other", tiny.config(intermediate_size=64))
        stored = load_file(folder / "other/model.safetensors")
        stored = {name: tensor * (tensor > 0) for name, tensor in stored.items()}
        save_file(stored, folder / "other/model.safetensors", metadata={"format": "pt"})
        options["--mask"] = f"from-checkpoint:{folder / 'other'}"
    elif name == "no mask file":
        options["--mask"] = "from-file:nowhere.safetensors"
    elif name == "no gpu":
        options["--device"] = "tpu"
    return [part for option in options.items() for part in option]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("existing output", "already exists: choose another --out"),
        ("unknown checkpoint", "Did you mean llama-7b?"),
        ("unreachable hub", "the hub cannot be reached"),
        ("impossible pattern", "divisible by 7"),
        ("too little text", "200 documents, but 5000 windows are wanted"),
        ("window too long", "longer than the model's 1024 positions"),
        (
            "nan",
            "layers.2.self_attn.o_proj.kernel[3, 3]: it holds a number that is not finite, found "
            "nan",
        ),
        ("truncated", "model.safetensors: it is truncated"),
        ("no tokenizer", "has no tokenizer"),
        (
            "dense mask",
            "has 0 % zeros at most in its first, middle and last layer: it is not pruned",
        ),
        ("mask of another model", "the mask was made for another model"),
        ("no mask file", "nowhere.safetensors: it is missing"),
        ("no gpu", "JAX finds no tpu"),
    ],
)
def test_bad_input_is_one_error_and_harms_nothing(
    name: str,
    message: str,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    args = bad_input(name, checkpoint, text, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    if name in ("no gpu", "unreachable hub"):  # which libraries decide on when they are imported
        done = jaxprune(*args, cwd=tmp_path)
        status, said = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        status, said = main([*map(str, args)]), capsys.readouterr().err
    assert status == 2
    assert message in said
    assert "Traceback" not in said and said.count("error: ") == 1
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    # Layers that were finished before the error are kept.
    assert {p: content for p, content in after.items() if "out.unfinished" not in p.parts} == before
    assert (
        ("finished work is saved in" in said)
        == (tmp_path / "out.unfinished").exists()
        == (name == "nan")
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--skip nothing", "no linear layer is named 'nothing'"),
        ("--rule nothing=0.5", "no linear layer is named 'nothing'"),
        ("--pattern 2:5", "pattern 2:5 needs a number of inputs divisible by 5"),
        ("--mask from-file:nope", "nope: it is missing"),
        ("--resume", "there is nothing to resume at "),
        ("--route-all", "the model has no experts"),
        ("--sparsity 0.5 --sparsity 0.6", "--sparsity specified multiple times"),
    ],
)
def test_what_cannot_be_is_said_before_the_weights_are_opened(
    line: str, problem: str, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("jaxprune.api.load.load", None)
    options = ["--ckpt", checkpoint, "--calib", text, "--out", "out", *line.split()]
    done = here(*options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert problem in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
