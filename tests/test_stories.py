"""A small trained model: pruning it costs what the methods promise."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from convert import create_checkpoint
from jaxprune import Unstructured, load, prune_layers
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.loop import other_params
from jaxprune.methods import Method
from jaxprune.methods.admm import ADMM
from jaxprune.methods.combine import Crossed
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.wanda import Wanda
from jaxprune.sparsity.patterns import Pattern
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch


@pytest.fixture(scope="module")
def stories(stories_model: Path) -> tuple[Path, np.ndarray]:
    """The model's folder, and 48 windows of 128 tokens that it told itself."""
    model = AutoModelForCausalLM.from_pretrained(stories_model).eval()
    torch.manual_seed(0)
    start = torch.full((48, 1), 1)
    told = model.generate(
        start, max_new_tokens=127, min_new_tokens=127, do_sample=True, top_k=0, pad_token_id=0
    )
    return stories_model, told.numpy().astype(np.int32)


@pytest.mark.slow
def test_better_methods_give_better_models(
    stories: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder, tokens = stories
    calibration, held_out = tokens[:32], tokens[32:]
    model = load(folder)
    reader = model.reader

    def pruned(method: Method, pattern: Pattern) -> float:
        target = tmp_path / "pruned"
        with create_checkpoint(target, reader.spec, reader.assets, overwrite=True) as out:
            for layer in prune_layers(model, calibration, method, pattern):
                out.write(layer.params)
            for paths in other_params(reader.spec):
                out.write(reader.read(paths))
        return perplexity(load(target), held_out)

    dense = perplexity(model, held_out)
    pattern, per_output = Unstructured(0.6), Unstructured(0.6, per_output=True)
    magnitude, wanda = pruned(Magnitude(), pattern), pruned(Wanda(), per_output)
    admm1, admm = pruned(Crossed(Wanda(), ADMM()), per_output), pruned(ADMM(), pattern)
    assert dense < admm < admm1 < wanda < magnitude, (dense, admm, admm1, wanda, magnitude)
