"""A resumed run notices whatever has changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.commands.prune import main
from jaxprune.solve import layer
from tests.helpers import tiny
from tests.helpers.command import failing

TENSORS = {
    "the embedding": "model.embed_tokens.weight",
    "a layer that is pruned": "model.layers.1.mlp.up_proj.weight",
    "a layer that is not": "model.layers.4.self_attn.q_proj.weight",
    "a norm between them": "model.layers.2.input_layernorm.weight",
    "the last norm": "model.norm.weight",
    "the head": "lm_head.weight",
}
"""What is changed in the least -> the tensor."""
UNREAD = {"the last norm", "the head", "a layer that is not"}
"""Not read before the run stopped, so nothing was made from them that would be wrong now."""


@pytest.fixture
def stopped(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a run that stopped in its fourth layer; its checkpoint is at `tmp_path /
    "dense"`."""
    tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=6))
    argv = [
        "--ckpt",
        str(tmp_path / "dense"),
        "--calib",
        str(text),
        *"--nsamples 6 --seqlen 64".split(),
    ]
    argv += ["--eval", "none", "--sparsity", "0.60000001", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "prune_and_round", failing(layer.prune_and_round, 25))
        assert main(argv) == 2
    assert (tmp_path / "out.unfinished/pruned/2.safetensors").exists()
    return argv


def touch(folder: Path, name: str) -> None:
    """Changes one number of a tensor, but neither the file's size nor its time."""
    file = folder / "model.safetensors"
    times = os.stat(file)
    tensors = {key: np.array(value) for key, value in load_file(file).items()}
    tensors[name].reshape(-1)[-1] *= 1.0001
    save_file(tensors, file, metadata={"format": "pt"})
    assert os.stat(file).st_size == times.st_size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("what", [what for what in TENSORS if what not in UNREAD])
def test_a_changed_tensor_is_noticed(
    what: str, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kept = {p: p.read_bytes() for p in (tmp_path / "out.unfinished").rglob("*") if p.is_file()}
    touch(tmp_path / "dense", TENSORS[what])
    capsys.readouterr()
    assert main(stopped) == 2
    said = capsys.readouterr().err.splitlines()
    module = TENSORS[what].removeprefix("model.").removesuffix(".weight")
    assert (
        said[-1].startswith("error: ")
        and f": {module}." in said[-1]
        and "pruned already" in said[-1]
    )
    assert (
        kept.items()
        <= {
            p: p.read_bytes() for p in (tmp_path / "out.unfinished").rglob("*") if p.is_file()
        }.items()
    )


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        (
            "rope_parameters",
            {"rope_theta": 20000.0, "rope_type": "default"},
            "rope_theta: 10000.0 then, 20000.0 now",
        ),
        ("rms_norm_eps", 1e-6, "config.json.rms_norm_eps: 1e-05 then, 1e-06 now"),
        ("hidden_act", "relu", "config.json.hidden_act: silu then, relu now"),
        (
            "max_position_embeddings",
            2048,
            "config.json.max_position_embeddings: 1024 then, 2048 now",
        ),
    ],
)
def test_a_changed_configuration_is_noticed(
    entry: str,
    value: object,
    named: str,
    stopped: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "dense/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    capsys.readouterr()
    assert main(stopped) == 2
    assert named in capsys.readouterr().err


def test_sparsities_are_distinguished_to_the_last_digit(
    stopped: list[str], capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert main(["0.600000011" if word == "0.60000001" else word for word in stopped]) == 2
    assert "pattern.sparsity: 0.60000001 then, 0.600000011 now" in capsys.readouterr().err


def copied(folder: Path) -> None:
    """The same content in new files."""
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def unchanged(folder: Path) -> None:
    del folder  # unused


@pytest.mark.parametrize("change", [copied, unchanged])
def test_the_same_checkpoint_goes_on(
    change: Callable[[Path], None], stopped: list[str], tmp_path: Path
) -> None:
    change(tmp_path / "dense")
    assert main(stopped) == 0
    assert json.loads((tmp_path / "out/jaxprune.json").read_text())["resumed_layers"] == 3
    assert not (tmp_path / "out.unfinished").exists()


def test_a_tensor_that_changes_while_the_run_works_is_noticed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dense = tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=2))
    real, calls = layer.prune_and_round, []

    def touching(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 10:
            touch(dense, "model.layers.0.mlp.up_proj.weight")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layer, "prune_and_round", touching)
    argv = [
        "--ckpt",
        str(dense),
        "--calib",
        str(text),
        *"--nsamples 2 --seqlen 32 --eval none".split(),
    ]
    assert main([*argv, "--method", "magnitude", "--out", str(tmp_path / "out")]) == 2
    assert "the tensor changed during the run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_numbers_that_are_not_finite_end_a_run_wherever_they_are(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dense = tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=1))
    tensors = {
        key: np.array(value) for key, value in load_file(dense / "model.safetensors").items()
    }
    tensors[name].reshape(-1)[7] = np.inf
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    argv = [
        "--ckpt",
        str(dense),
        "--calib",
        str(text),
        *"--nsamples 2 --seqlen 32 --eval none".split(),
    ]
    assert main([*argv, "--method", "magnitude", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert (
        name.removeprefix("model.").removesuffix(".weight") in said
        and "not finite, found inf" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source", ["from-file:masks", pytest.param("from-checkpoint:given", marks=pytest.mark.slow)]
)
def test_changed_masks_are_noticed(
    source: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=2))
    line = f"--ckpt dense --calib {text} --nsamples 2 --seqlen 32 --eval none".split()
    given = [*line, *"--method magnitude --out given --save-masks masks --overwrite".split()]
    asked = [*line, "--mask", source, "--update", "exact", "--out", "out"]
    assert main(given) == 0
    with monkeypatch.context() as patch:
        patch.setattr(layer, "prune_and_round", failing(layer.prune_and_round, 10))
        assert main(asked) == 2
    assert main([*given, "--sparsity", "0.6"]) == 0
    capsys.readouterr()
    assert main(asked) == 2
    assert "masks.sha256: " in capsys.readouterr().err
    assert main(given) == 0
    assert main(asked) == 0
    assert json.loads((tmp_path / "out/jaxprune.json").read_text())["resumed_layers"] == 1
