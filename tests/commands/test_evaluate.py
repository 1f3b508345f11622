"""Evaluation from end to end, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from convert import create_checkpoint, open_checkpoint
from jaxprune import InputError, Measures, evaluate, load
from jaxprune.__main__ import main as jaxprune
from jaxprune.calibration import evaluation_windows
from jaxprune.commands.evaluate import Config, main, parse
from jaxprune.commands.prune import run
from jaxprune.commands.run_options import parse as parse_run
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.evaluation.tasks import ZERO_SHOT
from jaxprune.reporting import record as records
from tests.helpers import rows, tiny
from tests.helpers.optional import needs_torch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows.write(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "pruned"
    flags = [
        "--ckpt",
        checkpoint,
        "--out",
        out,
        *"--method wanda --sparsity 0.6 --calib".split(),
        text,
    ]
    run(*parse_run([*map(str, flags), "--nsamples", "4", "--seqlen", "32", "--eval", "none"]))
    return out


def test_two_models_of_one_name_are_not_taken_for_one(checkpoint: Path, text: Path) -> None:
    model, other = load(checkpoint), load(checkpoint)
    measures = Measures([str(text)], seqlen=32, windows=1)
    with pytest.raises(
        InputError, match=f"two models of the same name cannot be distinguished: {checkpoint}"
    ):
        evaluate(model, against=other, measures=measures)
    assert list(evaluate(model, model, measures=measures).qualities) == [str(checkpoint)]


@pytest.mark.slow
def test_several_checkpoints_are_measured_against_the_dense_one(
    checkpoint: Path, pruned: Path, text: Path, data: Path, tmp_path: Path
) -> None:
    reader = open_checkpoint(checkpoint)
    with create_checkpoint(tmp_path / "orbax", reader.spec, reader.assets, to="orbax") as writer:
        writer.write(reader.read(reader.spec))
    flags = ["--against", checkpoint, "--eval-text", text, "--eval-seqlen", 32, "--eval-windows", 5]
    flags += [
        "--tasks",
        "openbookqa,boolq,arc_easy",
        "--tasks-data",
        data,
        "--limit",
        2,
        "--out",
        tmp_path / "out",
    ]
    command = [sys.executable, "-m", "jaxprune", "evaluate", pruned, tmp_path / "orbax", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (
        "this takes about" in done.stdout
        and "plus compilation and the tasks of lm-eval" in done.stdout
    )
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    assert list(record["checkpoints"]) == [str(checkpoint), str(pruned), str(tmp_path / "orbax")]
    found = {Path(name).name: one for name, one in record["checkpoints"].items()}
    assert record["schema"] == found["pruned"]["run"]["schema"] == 3
    assert found["pruned"]["run"]["recipe"]["pattern"] == {"sparsity": 0.6, "per_output": True}
    assert found["orbax"]["run"] is None
    assert (
        found["pruned"]["sparsity"] == pytest.approx(0.6, abs=0.02)
        and found["orbax"]["sparsity"] == 0
    )
    tokens = evaluation_windows(str(text), AutoTokenizer.from_pretrained(checkpoint), 32, 5)
    for name, folder in (("pruned", pruned), (checkpoint.name, checkpoint)):
        measured = found[name]["quality"]["texts"][str(text)]
        assert measured["perplexity"] == pytest.approx(perplexity(load(folder), tokens))
        assert measured["windows"] == [5, 32]
    assert found["pruned"]["quality"]["texts"][str(text)]["kl"] > 0.01
    same = found["orbax"]["quality"]
    ours, theirs = (one["texts"][str(text)] for one in (same, found[checkpoint.name]["quality"]))
    assert ours == theirs | {"ratio": 1.0, "kl": 0.0, "top1": 1.0}
    assert same["tasks"] == found[checkpoint.name]["quality"]["tasks"]
    assert same["tasks"].keys() == {"openbookqa", "boolq", "arc_easy"}
    mean = sum(values["acc"] for values in same["tasks"].values()) / 3
    evaluation = records.load(tmp_path / "out")
    assert isinstance(evaluation, records.Evaluation)
    read = evaluation.checkpoints[str(tmp_path / "orbax")].quality
    assert read.mean_accuracy["acc"] == pytest.approx(mean)
    for name in found:
        lm_eval = json.loads((tmp_path / f"out/lm-eval-{name}.json").read_text())
        assert (
            lm_eval["results"]["boolq"]["acc,none"]
            == found[name]["quality"]["tasks"]["boolq"]["acc"]
        )
        assert lm_eval["n-samples"]["boolq"] == {"original": 3, "effective": 2}
        assert "samples" not in lm_eval
    page = (tmp_path / "out/report.html").read_text()
    assert "pruned" in page and "Zero-shot accuracy" in page and "Relative error by layer" in page
    for row in (
        "zeros of the linear layers",
        "KL divergence",
        "same most probable token",
        "openbookqa, acc_norm",
        "mean acc",
    ):
        assert row in done.stdout, row


@needs_torch
def test_the_backends_agree(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    tasks = {}
    for backend in ("jax", "torch"):
        out = tmp_path / backend
        flags = ["--eval", "zero-shot", "--tasks-data", data, "--backend", backend, "--out", out]
        assert main([str(checkpoint), *map(str, flags)]) == 0
        (one,) = json.loads((out / "jaxprune.json").read_text())["checkpoints"].values()
        tasks[backend] = one["quality"]["tasks"]
    assert tasks["jax"] == tasks["torch"] and list(tasks["jax"]) == list(ZERO_SHOT)


def test_a_run_ends_with_an_evaluation(
    checkpoint: Path, text: Path, data: Path, tmp_path: Path
) -> None:
    flags = [
        "--ckpt",
        checkpoint,
        "--out",
        tmp_path / "out",
        *"--method magnitude --sparsity 0.9 --calib".split(),
        text,
    ]
    flags += [
        *"--nsamples 4 --seqlen 32 --eval ppl,zero-shot --eval-text".split(),
        text,
        "--eval-windows",
        3,
    ]
    flags += ["--tasks", "rte,openbookqa", "--tasks-data", data]
    record = run(*parse_run(list(map(str, flags))))
    dense, pruned = record.evaluation["dense"], record.evaluation["pruned"]
    assert dense.texts[str(text)].kl is None
    assert pruned.texts[str(text)].ratio > 1 and pruned.texts[str(text)].kl > 0
    assert dense.tasks.keys() == pruned.tasks.keys() == {"rte", "openbookqa"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "jaxprune.json",
        "report.html",
        "lm-eval-dense.json",
        "lm-eval-pruned.json",
        "README.md",
    } <= names
    card = (tmp_path / "out/README.md").read_text()
    assert "|  | dense | pruned |" in card and "| openbookqa, acc_norm |" in card
    page = (tmp_path / "out/report.html").read_text()
    assert "What was done" in page and "Zero-shot accuracy" in page


def test_several_texts_have_rows_of_their_own(
    checkpoint: Path, pruned: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other.jsonl"
    tiny.write_text(other, documents=30, seed=9)
    flags = [
        "--eval",
        "ppl",
        "--eval-text",
        f"{text},{other}",
        *"--eval-seqlen 32 --eval-windows 3".split(),
    ]
    flags += ["--against", checkpoint, "--out", tmp_path / "out"]
    assert main([str(pruned), *map(str, flags)]) == 0
    printed = "".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    for found in record["checkpoints"][str(pruned)]["quality"]["texts"].values():
        assert f"{found['kl']:.4f}nats" in printed
    assert (tmp_path / "out/report.html").read_text().count(
        "<h3>KL divergence from the dense model"
    ) == 2


@pytest.mark.parametrize("command", ["evaluate", "prune --calib wikipedia --ckpt"])
@pytest.mark.parametrize(
    ("measures", "said"),
    [
        ("samples --prompts none.txt", "none.txt"),
        ("zero-shot --tasks bool", "lm-eval has no task 'bool'"),
    ],
)
def test_tasks_and_prompts_are_read_before_a_model_is_fetched(
    command: str,
    measures: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("convert.hub.resolve", None)
    monkeypatch.setattr("jaxprune.commands.evaluate.resolve", None)
    line = f"{command} some/model --eval {measures} --out {tmp_path / 'out'}"
    assert jaxprune(line.split()) == 2
    assert said in capsys.readouterr().err


def test_a_runs_record_is_not_replaced(
    pruned: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (pruned / "jaxprune.json").read_bytes()
    flags = [
        "--eval",
        "ppl",
        "--eval-text",
        text,
        "--eval-seqlen",
        32,
        "--out",
        pruned,
        "--overwrite",
    ]
    assert main([str(pruned), *map(str, flags)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (pruned / "jaxprune.json").read_bytes() == before


def test_defaults() -> None:
    config, names = parse(["a", "b"])
    assert names == ["a", "b"]
    assert config == Config(
        eval="ppl,zero-shot",
        eval_text="wikitext2",
        eval_seqlen=2048,
        tasks=",".join(ZERO_SHOT),
        backend="jax",
    )
    assert parse(["smollm2-135m", "--eval", "ppl"])[0].eval_text == "wikipedia"
    assert parse(["x", "--against", "smollm2-135m", "--eval", "ppl"])[0].tasks is None


def bad(name: str, checkpoint: Path, text: Path, folder: Path) -> list[object]:
    """A command line with one thing wrong."""
    flags: list[object] = [
        checkpoint,
        "--eval",
        "ppl",
        "--eval-text",
        text,
        "--eval-seqlen",
        32,
        "--out",
        folder / "out",
    ]
    if name == "existing output":
        (folder / "out").mkdir()
        (folder / "out" / "jaxprune.json").write_text("precious")
    elif name == "unknown checkpoint":
        flags[0] = "lama-7b"
    elif name == "unknown measure":
        flags[2] = "bleu"
    elif name == "unknown text":
        flags[4] = "nowhere.jsonl"
    elif name == "window too long":
        flags[6] = 2000
    elif name == "too little text":
        (folder / "short.txt").write_text("The cat.")
        flags[4] = folder / "short.txt"
    elif name == "short windows":
        np.save(folder / "ids.npy", np.zeros((4, 20), np.int32))
        flags[4] = folder / "ids.npy"
    elif name == "other tokenizer":
        other = tiny.save(folder / "other", tiny.config(vocab_size=303))
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens(["cat", "dog", "the"])
        tokenizer.save_pretrained(other)
        flags += ["--against", other]
    elif name == "same name":
        tiny.save(folder / "a" / checkpoint.name, tiny.config())
        flags.insert(0, folder / "a" / checkpoint.name)
    elif name == "unknown task":
        flags[2:5] = ["zero-shot", "--tasks", "bolq"]
        flags[5:7] = []
    elif name == "option for nothing":
        flags += ["--limit", 3]
    return flags


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("existing output", "already exists: choose another --out"),
        ("unknown checkpoint", "Did you mean llama-7b?"),
        ("unknown measure", "--eval takes ppl, samples, zero-shot, speed or none, not 'bleu'"),
        ("unknown text", "no text 'nowhere.jsonl'"),
        ("window too long", "longer than the model's 1024 positions"),
        ("too little text", "tokens to evaluate on, less than one window"),
        ("short windows", "fewer than 32: pass --eval-seqlen 20"),
        ("other tokenizer", "have different tokenizers"),
        ("same name", "cannot be distinguished"),
        ("unknown task", "no task 'bolq': did you mean boolq"),
        ("option for nothing", "--limit is for --eval zero-shot"),
    ],
)
def test_bad_input_is_one_error_and_harms_nothing(
    name: str,
    message: str,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    flags = bad(name, checkpoint, text, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(list(map(str, flags))) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
