"""A layer saved from the command line, and solved without the model."""

from pathlib import Path

import pytest

from jaxprune.commands import prune, snapshot, solve
from jaxprune.streaming import hidden_states


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


def test_it_is_of_the_run_with_these_flags(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(checkpoint), "--calib", str(text), "--nsamples", "4", "--seqlen", "32"]

    def taken(*more: str) -> bytes:
        assert snapshot.main(["l", "--layer", "1", *flags, "--overwrite", *more]) == 0
        return Path("l").read_bytes()

    assert taken("--skip", "layers.0.*") == taken("--dense-before") != taken()
    in_memory, mapped, folders = taken(), hidden_states._mapped, []
    monkeypatch.setattr(hidden_states, "_mapped", lambda *args: folders.append(args[0]) or mapped(*args))
    assert taken("--hidden", "disk") == in_memory and folders == [tmp_path]


@pytest.mark.parametrize(
    "flag",
    "--preset=fast --asymmetry=0.5 --token-power=1 --weigh-outputs --spread=0.1 --drop-experts=0.5 --route-all "
    "--dry-run --coordinator=auto --save-masks=m --resume --target=h100".split(),
)
def test_what_it_cannot_be_taken_with_is_refused(
    flag: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(tmp_path / "l"), "--layer", "0", "--ckpt", str(checkpoint), "--calib", str(text), flag]
    assert snapshot.main(line) == 2
    assert f"leave {flag.partition('=')[0]} out" in capsys.readouterr().err
    assert not (tmp_path / "l").exists()


def test_masks_that_it_reads_are_not_replaced(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(checkpoint), "--calib", str(text), "--nsamples", "2", "--seqlen", "16", "--eval", "none"]
    assert prune.main([*flags, "--method", "magnitude", "--out", "out", "--save-masks", "m"]) == 0
    before = Path("m").read_bytes()
    given = ["--mask", "from-file:m", "--update", "exact", "--overwrite"]
    assert snapshot.main(["m", "--layer", "1", *flags, *given]) == 2
    assert "it is also what is given as mask" in capsys.readouterr().err
    assert Path("m").read_bytes() == before
