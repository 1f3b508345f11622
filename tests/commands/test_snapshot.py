"""A layer saved from the command line, and solved without the model."""

from pathlib import Path

import pytest

from jaxprune.commands import snapshot, solve


def test_a_layer_is_saved_and_solved(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(checkpoint), "--calib", str(text), "--nsamples", "4", "--seqlen", "32"]
    line = ["l.safetensors", "--layer", "1", *flags]
    assert snapshot.main(line) == 0
    assert "mlp.down_proj" in capsys.readouterr().out
    assert solve.main(["l.safetensors", "--method", "sparsegpt"]) == 0
    assert capsys.readouterr().out.startswith("layer 1, sparsegpt, 50 %")
    before = Path("l.safetensors").read_bytes()
    assert snapshot.main(line) == 2
    assert "already exists" in capsys.readouterr().err
    assert Path("l.safetensors").read_bytes() == before
    assert snapshot.main(["m.safetensors", "--layer", "9", *flags]) == 2
    assert "there is no layer 9" in capsys.readouterr().err
    assert snapshot.main(["m.safetensors", "--layer", "-1", *flags]) == 2
    assert "--layer must be at least 0" in capsys.readouterr().err
