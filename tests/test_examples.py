"""docs/examples: a tiny pruned model is fine-tuned, learns, and keeps its zeros."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxprune import load
from jaxprune.__main__ import main
from jaxprune.calibration import evaluation_windows
from jaxprune.evaluation.perplexity import perplexity
from tests.helpers import tiny, xla
from tests.helpers.checkpoints import tensors
from tests.helpers.optional import needs_torch
from tests.helpers.zeros import pruned

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


def run(example: str, *args: object) -> str:
    environment = os.environ | xla.quick()
    command = [sys.executable, EXAMPLES / example, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "example, flags",
    [
        ("finetune_jax.py", ["--rate", "0.01"]),
        pytest.param(
            "finetune_pytorch.py", ["--rate", "0.01"], marks=[needs_torch, pytest.mark.slow]
        ),
        pytest.param("finetune_pytorch.py", ["--rate", "0.01", "--lora"], marks=needs_torch),
    ],
)
def test_a_fine_tuning_learns_and_keeps_the_zeros(
    example: str, flags: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = pruned(
        tiny.save(tmp_path / "dense", tiny.config(), dtype="float32"), tmp_path / "pruned"
    )
    run(example, source, text, tmp_path / "tuned", "--steps", 20, "--length", 32, *flags)
    assert main(["verify", str(tmp_path / "tuned"), "--zeros-of", str(source)]) == 0
    assert "all zeros of" in " ".join(capsys.readouterr().out.split())
    before, after = tensors(source), tensors(tmp_path / "tuned")
    assert before.keys() == after.keys()
    kernels = [name for name in before if "layers." in name and before[name].ndim == 2]
    assert all(np.any(before[name] != after[name]) for name in kernels)
    windows = evaluation_windows(str(text), tiny.tokenizer(), 32, 8)
    assert perplexity(load(tmp_path / "tuned"), windows) < 0.9 * perplexity(load(source), windows)
