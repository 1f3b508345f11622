"""Streamed perplexity against a plain loop over transformers' logits."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from jaxprune import InputError, load
from jaxprune.evaluation.perplexity import TextQuality, perplexity, text_quality
from jaxprune.streaming import head
from tests.helpers import tiny
from tests.helpers.optional import needs_torch, torch
from tests.helpers.transformers_model import perplexity_by_transformers


@needs_torch
@pytest.mark.parametrize(("count", "length", "chunk"), [(6, 100, 1024), (5, 33, 16), (1, 2, 7)])
def test_it_is_that_of_transformers(
    count: int, length: int, chunk: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 300, (count, length)).astype(np.int32)
    assert perplexity(load(checkpoint), tokens) == pytest.approx(
        perplexity_by_transformers(checkpoint, tokens), rel=1e-5
    )


@needs_torch
def test_a_trained_model(stories_model: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 512, (4, 256)).astype(np.int32)
    assert perplexity(load(stories_model), tokens) == pytest.approx(
        perplexity_by_transformers(stories_model, tokens), rel=1e-4
    )


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return (
            model(torch.tensor(tokens, dtype=torch.long))
            .logits[:, :-1]
            .double()
            .log_softmax(dim=-1)
            .numpy()
        )


@needs_torch
def test_divergence_is_that_of_the_whole_distributions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", 50)
    tokens = np.random.default_rng(0).integers(0, 300, (6, 40)).astype(np.int32)
    others = []
    for seed, size in ((1, 0.01), (2, 0.3)):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor += size * torch.randn_like(tensor)
        model.save_pretrained(tmp_path / str(seed))
        others.append(tmp_path / str(seed))
    found = text_quality([load(folder) for folder in (checkpoint, *others)], tokens)
    p = logits(checkpoint, tokens)
    expected = perplexity_by_transformers(checkpoint, tokens)
    assert found[0] == TextQuality((6, 40), found[0].perplexity)
    assert found[0].perplexity == pytest.approx(expected, rel=1e-5)
    for one, folder in zip(found[1:], others, strict=True):
        q = logits(folder, tokens)
        assert one.perplexity == pytest.approx(perplexity_by_transformers(folder, tokens), rel=1e-5)
        assert one.ratio == pytest.approx(one.perplexity / found[0].perplexity)
        assert one.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-3)
        assert one.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-6)
    assert found[1].kl < found[2].kl and found[1].top1 > found[2].top1


def test_a_model_agrees_with_itself(checkpoint: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, (2, 30)).astype(np.int32)
    _, same = text_quality([load(checkpoint)] * 2, tokens)
    assert (same.ratio, same.kl, same.top1) == (1.0, 0.0, 1.0)


def test_models_of_another_vocabulary_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", tiny.config(vocab_size=301))
    with pytest.raises(InputError, match="cannot be compared: give the dense checkpoint"):
        text_quality([load(checkpoint), load(other)], np.zeros((1, 8), np.int32))
