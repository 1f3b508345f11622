"""Runs that remove parts of the checkpoint `dense` in this folder, and what became of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxprune import load
from jaxprune.commands.verify import main as verify
from tests.helpers.optional import torch

WINDOWS = np.random.default_rng(0).integers(0, 300, (4, 40)).astype(np.int32)
LINE = "--ckpt dense --calib ids.npy --nsamples 4 --seqlen 40 --eval none".split()


def require_same_in_transformers(folder: str) -> Any:
    """Makes sure that transformers loads a checkpoint whole, and computes the same with it; returns
    what it loaded."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(info.values())
    with torch.no_grad():
        expected = loaded.double()(torch.tensor(WINDOWS.astype(np.int64))).logits.numpy()
    found = load(folder).logits(WINDOWS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    return loaded


def error_of_damaged_record(
    damage: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> str:
    """Damages what the record of `small` says of removed parts; returns how verify refuses it."""
    file = Path("small/jaxprune.json")
    record = json.loads(file.read_text())
    damage(record["removed"])
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert verify(["small", "--against", "dense"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
