"""Every family against transformers, on tiny random checkpoints: one battery for all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import load, models
from jaxprune.commands.evaluate import main as evaluate
from jaxprune.commands.prune import main as prune
from jaxprune.commands.verify import main as verify
from jaxprune.models import Layout
from jaxprune.models.common.expert_dispatch import EMPTY, Routed
from jaxprune.solve import layer
from jaxprune.solve.sensitivity import measure_sensitivity
from tests.helpers import families
from tests.helpers.command import failing
from tests.helpers.logits import logits
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch
FIRST = [(family, next(iter(variants))) for family, variants in families.VARIANTS.items()]
"""A variant of each family, whose layers attend to windows where most of its models' do."""
SOONER = ("gemma3_text", "phi3")
"""Families of which more is tried in every run of the tests: they have most that is not LLaMA's."""


def often(*often: str) -> list[Any]:
    """The variants of all families, those of most of them for `JAXPRUNE_SLOW`."""
    return [
        case if case[0] in often else pytest.param(*case, marks=pytest.mark.slow) for case in FIRST
    ]


def test_every_family_is_tried() -> None:
    assert models.names() == sorted(families.VARIANTS)


@pytest.mark.parametrize(("family", "variant"), families.CASES)
def test_logits_are_those_of_transformers(family: str, variant: str, tmp_path: Path) -> None:
    reference = families.save(tmp_path, families.config(family, variant))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 100))
    with torch.no_grad():  # in float64, for both float32 results differ from it by rounding
        theirs = reference(torch.tensor(tokens)).logits.numpy()
        expected = reference.double()(torch.tensor(tokens)).logits.numpy()
    found, _ = logits(load(tmp_path), tokens)
    # Where rounding grows, as it does through a random recurrence, theirs in float32 is no nearer.
    least = 3 * np.abs(theirs - expected).max() if family == "qwen3_5_text" else 0.0
    assert np.abs(found - expected).max() < max(least, 1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(("family", "variant"), FIRST)
def test_logits_in_bfloat16_are_near(family: str, variant: str, tmp_path: Path) -> None:
    reference = families.save(tmp_path, families.config(family, variant), dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, 300, (2, 60))
    with torch.no_grad():
        expected = reference.double()(torch.tensor(tokens)).logits.numpy()
        theirs = reference.bfloat16()(torch.tensor(tokens)).logits.double().numpy()
    found = load(tmp_path, dtype=jnp.bfloat16).logits(tokens.astype(np.int32)).astype(np.float64)
    # Where two experts score nearly alike, rounding decides which is taken: some tokens are far
    # from float64's.
    share = 0.75 if load(tmp_path).architecture.config.routing else 1.0
    far, as_far = (
        np.quantile(np.abs(one - expected).max(axis=-1), share) / np.ptp(expected)
        for one in (found, theirs)
    )
    assert far < max(2e-2, 1.5 * as_far)


@pytest.mark.parametrize(("family", "variant"), often(*SOONER))
def test_packed_texts_are_as_if_alone(family: str, variant: str, tmp_path: Path) -> None:
    """Two texts, the first with two continuations, all longer than the window of layers that have
    one."""
    families.save(tmp_path, families.config(family, variant))
    model, generator = load(tmp_path), np.random.default_rng(0)
    first, one, other, second = (
        generator.integers(0, 300, (1, n), np.int32) for n in (30, 25, 9, 40)
    )
    places = [np.arange(30), np.arange(30, 55), np.arange(30, 39), np.arange(40)]
    numbers = [np.full(len(place), number) for number, place in enumerate(places)]
    whole, position, number = (
        np.concatenate(parts, axis=-1) for parts in ((first, one, other, second), places, numbers)
    )
    group, branch = number // 3, np.where(number < 3, number, 0)
    layout = Layout(*(part[None].astype(np.int32) for part in (position, group, branch)))
    (packed,) = model.final_states(whole, layouts=[layout])
    for text, rows in (((first, one), (0, 1)), ((first, other), (0, 2)), ((second,), (3,))):
        (alone,) = model.final_states(np.concatenate(text, axis=1))
        found = packed.array[0, np.isin(number, rows)]
        np.testing.assert_allclose(
            found, alone.array[0], rtol=1e-4, atol=1e-4 * np.abs(alone.array).max()
        )


@pytest.mark.parametrize(
    ("family", "variant"), often(*SOONER, "llama", "cohere2", "mixtral", "gpt_oss", "qwen3_5_text")
)
def test_gradients_are_those_of_torch(family: str, variant: str, tmp_path: Path) -> None:
    """By the outputs of all linear layers: squared and summed over tokens, as `sensitivity` has
    them."""
    reference = families.save(tmp_path, families.config(family, variant)).double()
    tokens = np.random.default_rng(0).integers(0, 300, (2, 40), np.int32)
    ids = torch.tensor(tokens.astype(np.int64))
    with families.Squares(reference) as watching:
        scores = reference(ids).logits[:, :-1].reshape(-1, 300)
    torch.nn.functional.cross_entropy(scores, ids[:, 1:].reshape(-1), reduction="sum").backward()
    squares = watching.squares
    found = {
        f"{index}.{path}": square
        for index, layer in enumerate(measure_sensitivity(load(tmp_path), tokens))
        for path, square in layer.outputs.items()
    }
    # of experts that no token takes
    unused = {name for name, square in found.items() if not square.any()}
    # every linear layer of transformers' module is pruned
    assert found.keys() - unused == squares.keys() - unused
    for name, expected in squares.items():
        np.testing.assert_allclose(
            found[name], expected, rtol=1e-3, atol=1e-4 * expected.max(), err_msg=name
        )


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_rows_that_no_token_has_are_zero(family: str, tmp_path: Path) -> None:
    """What linear layers of experts read is summed without asking which rows are filled."""
    families.save(tmp_path, families.config(family, next(iter(families.VARIANTS[family]))))
    model = load(tmp_path)
    layer = model.architecture.layers[0]
    x = jnp.asarray(model.embed(np.random.default_rng(0).integers(0, 300, (2, 40), np.int32)).array)
    _, captures = jax.jit(layer)(model.put_layer(0, next(model.layers())), x)
    routed = [capture for capture in captures.values() if isinstance(capture, Routed)]
    assert len(routed) == 3
    for capture in routed:
        empty = np.asarray(capture.plan.assignments) == EMPTY
        assert (
            empty.any()
            and np.asarray(capture.x)[~empty].any()
            and not np.asarray(capture.x)[empty].any()
        )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), often("qwen3_moe"))
def test_a_run_that_was_stopped_goes_on_to_a_model_of_transformers(
    family: str,
    variant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config(family, variant))
    np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (4, 40)))
    text = ["--eval", "ppl", "--eval-text", "ids.npy", "--eval-seqlen", "40"]
    line = (
        "--ckpt dense --preset best --sparsity 0.6 --calib ids.npy --nsamples 4 --seqlen 40 --out "
        "pruned"
    ).split()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "prune_and_round", failing(layer.prune_and_round, 9))
        assert prune([*line, *text]) == 2
    assert prune([*line, *text, "--resume"]) == 0
    assert verify(["pruned", "--against", "dense"]) == 0
    assert evaluate(["pruned", "--against", "dense", *text]) == 0
    capsys.readouterr()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        "pruned", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values())
    tokens = np.load("ids.npy").astype(np.int32)
    with torch.no_grad():
        expected = loaded.double()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    found = load("pruned").logits(tokens)
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
