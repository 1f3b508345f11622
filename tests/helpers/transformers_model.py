"""What transformers makes of a checkpoint."""

import math
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from tests.helpers.optional import torch


def perplexity_by_transformers(folder: Path, tokens: np.ndarray) -> float:
    """The perplexity of windows of token ids."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    with torch.no_grad():
        for window in torch.tensor(tokens, dtype=torch.long):
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))
