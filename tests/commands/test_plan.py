"""What a run would need, printed: for this machine's device, and for another one that is large
enough or not."""

from pathlib import Path

import pytest

from jaxprune import __main__ as commands
from jaxprune.commands import plan


def test_what_a_run_would_refuse_a_plan_refuses(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        commands.main(
            ["plan", "--ckpt", str(checkpoint), "--seqlen", "32", "--route-all", "--eval", "none"]
        )
        == 2
    )
    assert (
        "the model has no experts to route tokens to: leave --route-all out"
        in capsys.readouterr().err
    )


def test_what_stays_dense_need_not_fit_the_pattern(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", "--ckpt", str(checkpoint), *"--seqlen 32 --eval none --method wanda".split()]
    assert commands.main([*line, "--pattern", "16:32"]) == 2
    assert "a kernel has 48" in capsys.readouterr().err
    assert commands.main([*line, "--pattern", "16:32", "--skip", "*.down_proj"]) == 0


@pytest.mark.parametrize(
    ("flags", "gain", "said"), [([], 2.0, True), ([], 1.2, False), (["bfloat16"], 2.0, False)]
)
def test_a_plan_says_where_bfloat16_is_faster(
    flags: list[str],
    gain: float,
    said: bool,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "matrix_rate", {"float32": 1e11, "bfloat16": gain * 1e11}.__getitem__)
    dtype = ["--dtype", *flags] if flags else []
    options = [*"--nsamples 4 --seqlen 32 --eval none --method magnitude".split(), *dtype]
    assert commands.main(["plan", "--ckpt", str(checkpoint), *options]) == 0
    assert ("2.0 times as fast: try --dtype bfloat16" in capsys.readouterr().out) == said


def test_every_text_is_counted_and_what_is_not_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*flags: str) -> tuple[float, str]:
        options = [*"--nsamples 4 --seqlen 32 --eval-windows 4 --device-memory 16".split(), *flags]
        assert commands.main(["plan", "--ckpt", str(checkpoint), *options]) == 0
        printed = capsys.readouterr().out
        [row] = [line for line in printed.splitlines() if "evaluate" in line]
        return float(row.split()[-2]), printed

    one, printed = planned("--eval-text", "wikipedia")
    assert "not counted" not in printed
    two, printed = planned("--eval-text", "wikipedia,wikitext2", "--eval", "ppl,zero-shot,samples")
    assert (
        two == pytest.approx(2 * one, rel=0.01)
        and "not counted: --eval zero-shot,samples" in printed
    )


@pytest.mark.parametrize(
    ("command", "device", "status", "said"),
    [
        (["plan"], [], 0, "time: from the matrix rate"),
        (["plan"], ["16"], 0, "it fits"),
        (["prune", "--dry-run"], ["16"], 0, "it fits"),
        (["prune", "--dry-run"], ["0.0001"], 1, "does not fit: "),
    ],
)
def test_a_plan_is_a_table_and_an_exit_status(
    command: list[str],
    device: list[str],
    status: int,
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--ckpt", str(checkpoint), *"--nsamples 4 --seqlen 32 --eval none --out".split()]
    memory = ["--device-memory", *device] if device else []
    assert commands.main([*command, *options, str(tmp_path / "out"), *memory]) == status
    out = capsys.readouterr().out
    assert said in out and all(f"│ {phase}" in out for phase in ("gram", "solve", "forward", "all"))
    assert ("about" in out) == (not device)  # nothing is known of how fast another device is
    assert ("most of it is" in out) == (not device)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_run_would(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    for flags, said in (
        (["--out", tmp_path / "other", "--calib", tmp_path / "none.jsonl:2,wikipedia"], "no text"),
        (
            [
                "--out",
                tmp_path / "other",
                "--preset",
                "thorough",
                "--tune-text",
                tmp_path / "none.jsonl",
            ],
            "no text",
        ),
        (["--out", tmp_path / "out"], "it already exists"),
    ):
        assert (
            commands.main(
                [*map(str, ["prune", "--dry-run", "--ckpt", checkpoint, "--eval", "none", *flags])]
            )
            == 2
        )
        assert said in capsys.readouterr().err
    assert (tmp_path / "out/mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
