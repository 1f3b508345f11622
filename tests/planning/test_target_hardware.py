"""Hardware that is not here: what a plan says of it, with and without its compiler."""

import dataclasses
from pathlib import Path

import pytest

from jaxprune import InputError
from jaxprune.commands.plan import main
from jaxprune.commands.prune import main as prune
from jaxprune.planning import target_hardware
from jaxprune.planning.target_hardware import TARGETS, Target, target_of


def line(checkpoint: Path, target: str) -> list[str]:
    return [
        "--ckpt",
        str(checkpoint),
        *"--nsamples 4 --seqlen 32 --eval none --target".split(),
        target,
    ]


def test_a_program_takes_as_long_as_its_products_or_what_it_moves() -> None:
    h100 = TARGETS["h100"]
    assert h100.seconds({"bfloat16": 989.4e12}, 0) == pytest.approx(1)
    assert h100.seconds({"float32": 66.9e12, "bfloat16": 989.4e12}, 0) == pytest.approx(2)
    assert h100.seconds({"bfloat16": 1.0}, 3.35e12) == pytest.approx(1)
    assert all(one.rates["bfloat16"] >= 2 * one.rates["float32"] > 0 for one in TARGETS.values())


def test_without_a_compiler_a_plan_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {
        name: dataclasses.replace(one, extra=("plan-x", "no_such_module"))
        for name, one in TARGETS.items()
    }
    monkeypatch.setattr(target_hardware, "TARGETS", without)
    assert main(line(checkpoint, "h100,v5e")) == 0
    out = capsys.readouterr().out
    assert (
        "pip install 'jaxprune[plan-x]'" in out
        and "1 × NVIDIA H100" in out
        and "1 × TPU v5e" in out
    )
    assert out.count("│ gram") == 2 and "predictions at the data sheets' rates" in out
    small = dataclasses.replace(without["v5e"], memory=1e5)
    monkeypatch.setattr(target_hardware, "TARGETS", without | {"v5e": small})
    assert main(line(checkpoint, "h100,v5e")) == 1
    out = capsys.readouterr().out
    assert (
        "may not fit (its compiler can tell): v5e: gram needs" in out and "does not fit" not in out
    )
    assert "lower --seqlen" not in out and "perhaps" in out
    assert main([*line(checkpoint, "v5e"), "--devices", "8"]) == 2
    assert (
        "several TPU v5e need their compiler: pip install 'jaxprune[plan-x]'"
        in capsys.readouterr().err
    )


def test_an_unknown_target_is_one_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(checkpoint, "h100,b200")) == 2
    assert (
        "no hardware is called 'b200': h100, a100, rtx4090, v5e, v5p, v6e are known"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory", "16"], "leave --device-memory out"),
        (["--device", "cpu"], "leave --device out"),
    ],
)
def test_other_words_on_hardware_do_not_go_with_a_target(
    options: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line(checkpoint, "h100"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_takes_what_is_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(line(checkpoint, "h100")) == 2
    assert "--target is for jaxprune plan and --dry-run" in capsys.readouterr().err


def with_compiler(name: str) -> Target:
    target = target_of(name)
    if not target.has_compiler:
        pytest.skip(f"the compiler of {target.display_name} is not installed: {target.install}")
    return target


@pytest.mark.parametrize("name", TARGETS)
def test_one_and_eight_of_each_are_described(name: str) -> None:
    target = with_compiler(name)
    assert target.devices(1).count == 1 and target.devices(8).count == 8


@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_what_its_compiler_says(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = with_compiler(name)
    assert main(line(checkpoint, name)) == 0
    out = capsys.readouterr().out
    assert "is not installed" not in out and target.display_name in out


def test_of_a_gpus_memory_jax_takes_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert TARGETS["h100"].usable == 60e9 and TARGETS["v5e"].usable == 16e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert TARGETS["h100"].usable == pytest.approx(72e9)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "much")
    with pytest.raises(InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION is 'much'"):
        _ = TARGETS["h100"].usable
