"""The one table of commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxprune import __main__ as commands
from tests.helpers import tiny

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("module", ["jaxprune", "jaxprune.run"])
def test_an_early_signal_ends_the_process(module: str, seconds: float, tmp_path: Path) -> None:
    """While libraries are imported too, which swallow exceptions or crash of them."""
    tiny.save(tmp_path, tiny.config())
    line = f"{module} --ckpt . --calib none.txt --out out"
    process = subprocess.Popen(
        [sys.executable, "-m", *line.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # 2: it was over before, for there is no such text
    assert process.returncode in (2, 130, -signal.SIGINT) and "Traceback" not in said, said


@pytest.mark.parametrize("module", ["jaxprune", "jaxprune.run"])
def test_a_file_that_hides_convert_is_named(module: str, tmp_path: Path) -> None:
    (tmp_path / "convert.py").write_text("raise SystemExit('it ran')")
    done = subprocess.run(
        [sys.executable, "-m", module, "--ckpt", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = f"ImportError: {tmp_path}/convert.py hides jaxprune's package of the name convert: "
    assert done.stderr.splitlines()[-1].startswith(said)
