"""The one table of commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprune import __main__ as commands
from tests.helpers import tiny


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([]) == commands.main(["--help"]) == 0
    text = capsys.readouterr().out
    names = "prune evaluate verify report plan generate snapshot solve convert push lm-eval".split()
    assert commands.names() == names and all(f"  {name} " in text for name in names)


@pytest.mark.parametrize("name", commands.names())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = commands.main([name, "--help"])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 0 and len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["prunr"], "did you mean prune?"),
        (["xyz"], "there are prune, evaluate"),
        (["prune", "--ckpt", "x", "--sparsty", "0.5"], "--sparsity"),
        (["verify", "x", "--agianst", "y"], "--against"),
        (["--sparsity", "0.5"], "--ckpt is missing"),
        (["prune", "--ckpt"], "--ckpt requires an argument"),
        (["verify"], "CHECKPOINT is missing"),
        (
            ["prune", "--ckpt", "x", "--method", "wanda", "--iterations", "3"],
            "an option of --method admm",
        ),
        (["solve", "x", "--method=wanda", "--iterations=3"], "an option of --method admm"),
    ],
)
def test_a_mistyped_word_is_one_line(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(line) == 2
    found = capsys.readouterr().err
    assert message in found and found.startswith("error: ") and found.count("\n") == 1


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, jaxprune, jaxprune.__main__; print({'jax', 'numpy', 'transformers'} & "
        "sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxprune 0.")


@pytest.mark.parametrize("line", ["--help", "--version", "verify --help", "verify ."])
@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("closed", 141, ""),
        ("/dev/full", 2, "error: the output cannot be written (No space left on device)\n"),
    ],
)
def test_output_that_cannot_be_written(
    line: str, output: str, status: int, said: str, tmp_path: Path
) -> None:
    """One line and a status of its own, which is not that of an answer or of a defect."""
    tiny.save(tmp_path, tiny.config())
    if output == "closed":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(output, os.O_WRONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxprune", *line.split()],
            cwd=tmp_path,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (status, said)
