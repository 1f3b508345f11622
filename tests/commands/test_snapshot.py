"""A layer saved from the command line, and solved without the model."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxprune.api import snapshot as snapshots
from jaxprune.commands import prune, snapshot, solve
from jaxprune.streaming import hidden_states


def test_a_layer_is_saved_and_solved(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(checkpoint), "--calib", str(text), "--nsamples", "4", "--seqlen", "32"]
    line = ["l.safetensors", "--layer", "1", *flags]
    assert snapshot.main(line) == 0
    assert "mlp.down_proj" in capsys.readouterr().out
    assert solve.main(["l.safetensors", "--method", "sparsegpt"]) == 0
    assert capsys.readouterr().out.startswith("layer 1, sparsegpt, patterns of its run")
    for given in ("--sparsity 0.6", "--pattern 2:4"):
        assert solve.main(["l.safetensors", *given.split()]) == 0
        assert "patterns of its run" not in capsys.readouterr().out
    before = Path("l.safetensors").read_bytes()
    assert snapshot.main(line) == 2
    assert "already exists" in capsys.readouterr().err
    assert Path("l.safetensors").read_bytes() == before
    assert snapshot.main(["m.safetensors", "--layer", "9", *flags]) == 2
    assert "there is no layer 9" in capsys.readouterr().err
    assert snapshot.main(["m.safetensors", "--layer", "-1", *flags]) == 2
    assert "--layer must be at least 0" in capsys.readouterr().err


def test_it_is_of_the_run_with_these_flags(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(checkpoint), "--calib", str(text), "--nsamples", "4", "--seqlen", "32"]

    def taken(*more: str) -> bytes:
        assert snapshot.main(["l", "--layer", "1", *flags, "--overwrite", *more]) == 0
        return Path("l").read_bytes()

    assert taken("--skip", "layers.0.*") == taken("--dense-before") != taken()

    def gram(line: str) -> np.ndarray:
        taken(*line.split())
        return snapshots.load(Path("l")).grams["mlp_input"]

    late = gram("--sparsity 0.75 --tune-epochs 1 --tune-gradual 1")  # 50 % before the tuning
    np.testing.assert_allclose(late, gram("--sparsity 0.5"), rtol=1e-5)
    assert not np.allclose(late, gram("--sparsity 0.75"), rtol=1e-2)
    in_memory, mapped, folders = taken(), hidden_states._mapped, []
    monkeypatch.setattr(
        hidden_states, "_mapped", lambda *args: folders.append(args[0]) or mapped(*args)
    )
    assert taken("--hidden", "disk") == in_memory and folders == [tmp_path]


def test_a_run_is_repeated_up_to_a_layer(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        f"--ckpt {checkpoint} --calib {text} --nsamples 4 --seqlen 32 --preset best --sparsity 0.9"
    )
    tuned = ["--tune-tokens", "1k", "--tune-text", str(text), "--save-masks", "m", "--out", "run"]
    assert prune.main([*line.split(), *tuned, "--eval", "none"]) == 0
    capsys.readouterr()
    assert snapshot.main(["l", "--config", "run/jaxprune.json", "--layer", "1"]) == 0
    assert solve.main(["l", "--damping", "0.03"]) == 0
    *_, shown = capsys.readouterr().out.partition("patterns of its run")
    errors = {row.split()[0]: row.split()[4] for row in shown.splitlines()[2:]}
    record = json.loads(Path("run/jaxprune.json").read_text())["layers"][1]["kernels"]
    assert errors == {path: f"{kernel['error']:.6f}" for path, kernel in record.items()}


@pytest.mark.parametrize(
    "flag",
    "--dry-run --coordinator=auto --save-masks=m --resume --target=h100 --device-memory=9".split(),
)
def test_what_it_cannot_be_taken_with_is_refused(
    flag: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        str(tmp_path / "l"),
        "--layer",
        "0",
        "--ckpt",
        str(checkpoint),
        "--calib",
        str(text),
        flag,
    ]
    assert snapshot.main(line) == 2
    assert f"leave {flag.partition('=')[0]} out" in capsys.readouterr().err
    name, _, value = flag.removeprefix("--").partition("=")
    file = tmp_path / "options.yaml"
    file.write_text(f"{name}: {value or 'true'}\n")
    assert snapshot.main([*line[:-1], "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: {name.replace('-', '_')}: ") and error.endswith(
        ": remove this entry\n"
    )
    assert not (tmp_path / "l").exists()


def test_masks_decide_what_stays_and_are_not_replaced(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        "--ckpt",
        str(checkpoint),
        "--calib",
        str(text),
        *"--nsamples 2 --seqlen 16 --eval none".split(),
    ]
    assert prune.main([*flags, "--method", "magnitude", "--out", "out", "--save-masks", "m"]) == 0
    before = Path("m").read_bytes()
    given = ["--mask", "from-file:m", "--update", "exact", "--overwrite"]
    assert snapshot.main(["m", "--layer", "1", *flags, *given]) == 2
    assert "it is also what is given as mask" in capsys.readouterr().err
    assert Path("m").read_bytes() == before
    assert (
        snapshot.main(["l", "--layer", "1", *flags, *given]) == 0
        and not snapshots.load(Path("l")).patterns
    )
    assert solve.main(["l", *given[:-1]]) == 0
    assert "patterns of its run" not in capsys.readouterr().out
    assert snapshot.main(["l", "--layer", "1", *flags, "--skip", "layers.1.*", "--overwrite"]) == 2
    assert (
        "the rules leave layer 1 dense: choose another --layer, or choose another --skip"
        in capsys.readouterr().err
    )
