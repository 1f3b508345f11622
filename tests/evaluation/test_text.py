"""Streamed perplexity against a plain loop over transformers' logits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from convert import open_checkpoint
from jaxprune import stream
from jaxprune.evaluation.text import perplexity


def plain(folder: Path, tokens: np.ndarray) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    with torch.no_grad():
        for window in torch.tensor(tokens, dtype=torch.long):
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("count", "length", "chunk"), [(6, 100, 1024), (5, 33, 16), (1, 2, 7)])
def test_it_is_the_plain_one(
    count: int, length: int, chunk: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 300, (count, length)).astype(np.int32)
    assert perplexity(open_checkpoint(checkpoint), tokens) == pytest.approx(plain(checkpoint, tokens), rel=1e-5)


def test_a_trained_model(data: Path) -> None:
    folder = data / "models/stories260K"
    tokens = np.random.default_rng(1).integers(0, 512, (4, 256)).astype(np.int32)
    assert perplexity(open_checkpoint(folder), tokens) == pytest.approx(plain(folder, tokens), rel=1e-4)
