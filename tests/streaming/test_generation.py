"""Continuations with a cache are those of whole passes, of every family."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import InputError, load
from jaxprune.models import Part
from jaxprune.streaming import generation
from jaxprune.streaming.generation import generate, in_batches
from jaxprune.streaming.head import drawn
from jaxprune.streaming.model import StreamedModel
from tests.helpers import cgroups, families, tiny
from tests.helpers.optional import needs_torch

FAMILIES = ["llama", "gemma2", "gpt_oss", "qwen3_next", "opt", "mixtral"]


@needs_torch
@pytest.mark.parametrize(
    "family",
    [
        one if one in FAMILIES else pytest.param(one, marks=pytest.mark.slow)
        for one in families.VARIANTS
    ],
)
def test_continuations_are_those_of_whole_passes(family: str, tmp_path: Path) -> None:
    families.save(tmp_path / "hf", families.config(family, next(iter(families.VARIANTS[family]))))
    model = load(tmp_path / "hf")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, 300, length).tolist() for length in (3, 25, 7)]
    found = generate(model, prompts, [5, 5, 5], lambda number, made: False)
    assert [len(made) for made in found] == [5, 5, 5]
    # One pass over all of them: a token is the most probable one after those before it, and what
    # fills up comes later.
    whole = np.zeros((3, 30), np.int32)
    for row, prompt, made in zip(whole, prompts, found, strict=True):
        row[: len(prompt) + 5] = prompt + made
    logits = model.logits(whole)
    for row, prompt, made in zip(logits, prompts, found, strict=True):
        assert row[len(prompt) - 1 :][:5].argmax(-1).tolist() == made


def test_texts_end_where_they_are_told(checkpoint: Path) -> None:
    model = load(checkpoint)
    prompts = [[1, 2, 3], [4], [5, 6]]
    whole = generate(model, prompts, [6, 6, 6], lambda number, made: False)
    assert [len(one) for one in whole] == [6, 6, 6]
    assert generate(model, prompts, [2, 0, 4], lambda number, made: False) == [
        whole[0][:2],
        [],
        whole[2][:4],
    ]
    stop = whole[1][1]
    found = generate(
        model, prompts, [6, 6, 6], lambda number, made: number == 1 and made[-1] == stop
    )
    assert found[1] == whole[1][: whole[1].index(stop) + 1]


def test_it_does_not_matter_what_has_room(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint)
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = generate(model, prompts, [4, 4, 4], lambda number, made: False)
    monkeypatch.setattr(generation, "_memory", lambda: 1)  # a layer at a time, and a text
    assert generate(model, prompts, [4, 4, 4], lambda number, made: False) == expected


def test_batches_are_smaller_where_a_container_has_little_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = load(checkpoint), [[1, 2, 3], [4], [5, 6], [7]]

    def batches() -> list[dict[int, list[int]]]:
        return list(in_batches(model, prompts, [4] * 4, lambda number, made: False))

    (expected,) = batches()
    size = sum(
        p.size * p.dtype.itemsize
        for layer in model.architecture.layers
        for p in layer.spec.values()
    )
    text = generation._bytes_of_text(model.architecture, generation.BLOCK)
    # room for five texts, half of which they get
    cgroups.limit(tmp_path, monkeypatch, (size + 5 * text) * 3 // 2)
    found = batches()
    assert [len(batch) for batch in found] == [2, 2]
    assert {number: new for batch in found for number, new in batch.items()} == expected


@pytest.mark.parametrize(("more", "times"), [(1, 1), (-1, 5)])
def test_layers_stay_where_they_fit_though_few_texts_do(
    more: int, times: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reads = load(checkpoint), []
    layers = sum(
        p.size * p.dtype.itemsize
        for layer in model.architecture.layers
        for p in layer.spec.values()
    )
    monkeypatch.setattr(generation, "_memory", lambda: layers / generation.STAY + more)
    read = StreamedModel._read_layer
    monkeypatch.setattr(
        StreamedModel,
        "_read_layer",
        lambda self, index: (reads.append(index), read(self, index))[1],
    )
    generate(model, [[1, 2, 3]], [5], lambda number, made: False)
    assert sorted(reads) == sorted([0, 1, 2] * times)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    model = load(tiny.save(tmp_path / "hf", tiny.config(max_position_embeddings=16)))
    if model.architecture.config.max_positions is not None:
        with pytest.raises(InputError, match="16 positions"):
            generate(model, [list(range(1, 10))], [20], lambda number, made: False)
    with pytest.raises(InputError, match="vocabulary"):
        generate(model, [[1, 100_000]], [2], lambda number, made: False)


def test_tokens_are_drawn_as_the_model_has_them(checkpoint: Path) -> None:
    """A text has those of its seed and place, whatever else is written; they are as frequent as
    they are probable."""
    model = load(checkpoint)

    def drawn(most: list[int], seed: int) -> list[list[int]]:
        batches = in_batches(
            model, [[1, 2, 3]] * len(most), most, lambda number, made: False, seed=seed
        )
        made = {number: new for batch in batches for number, new in batch.items()}
        return [made[number] for number in range(len(most))]

    many, few = drawn([2] * 4000, 0), drawn([1, 0, 2], 0)
    assert few == [many[0][:1], [], many[2]]
    assert many != drawn([2] * 4000, 1)
    scores = model.logits(np.array([[1, 2, 3]], np.int32))[0, -1].astype(np.float64)
    probable = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    found = np.bincount([first for first, _ in many], minlength=len(probable)) / 4000
    assert np.abs(found - probable).max() < 4 * np.sqrt(probable.max() / 4000)


class Same(nnx.Module):
    """A head whose logits are the hidden states."""

    def __call__(self, states: Any) -> Any:
        return states


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 1), (0.24, 1), (0.26, 2), (np.nextafter(np.float32(1), 0), 2)]
)
def test_a_share_draws_the_token_that_passes_it(share: float, expected: int) -> None:
    """Of four tokens with probabilities 0, 1/4, 3/4 and 0."""
    states = jnp.log(jnp.array([[0, 1, 3, 0]], jnp.float32) + 1e-30)
    ids, finite = drawn(Part(Same, None), {}, states, jnp.array([share], jnp.float32))
    assert ids.tolist() == [expected] and finite.all()


@pytest.mark.parametrize("uniform", [None, np.full(3, 0.5, np.float32)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_are_an_error(
    bad: float, uniform: Any, checkpoint: Path
) -> None:
    model = load(checkpoint)
    head, states = (
        model.params_of(model.architecture.head),
        np.zeros((3, model.architecture.width), np.float32),
    )
    assert len(model.next_tokens(head, states, uniform)) == 3
    states[1, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        model.next_tokens(head, states, uniform)
