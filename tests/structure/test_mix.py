"""The mix of layers, heads and channels that makes up for a fraction of the parameters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxprune import load
from jaxprune.commands.convert import main as convert
from jaxprune.commands.plan import main as plan
from jaxprune.commands.prune import main
from jaxprune.commands.verify import main as verify
from jaxprune.evaluation import perplexity
from jaxprune.recipe_parts import Structure
from jaxprune.structure.mix import chosen_mix
from jaxprune.structure.removal import remove
from jaxprune.structure.sizes import layer_parameters
from tests.helpers import families
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch
from tests.helpers.removals import error_of_damaged_record, require_same_in_transformers

TOKENS = np.random.default_rng(1).integers(0, 300, (8, 40)).astype(np.int32)
LINE = "--ckpt dense --calib ids.npy --nsamples 8 --seqlen 40 --eval none".split()
SHARE = "--drop-parameters 0.3 --channel-multiple 8".split()
pytestmark = needs_torch


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint of four layers and token ids, entered."""
    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config("llama", "plain", num_hidden_layers=4))
    np.save("ids.npy", TOKENS)
    return tmp_path


def parameters(folder: str) -> int:
    return layer_parameters(load(folder).architecture)


def test_the_mix_of_least_divergence_is_removed(here: Path) -> None:
    assert main([*LINE, *SHARE, "--out", "small"]) == 0
    mix = json.loads(Path("small/jaxprune.json").read_text())["removed"]["mix"]
    candidates = mix["candidates"]
    assert len(candidates) >= 3
    first = candidates[0]["structure"]
    assert first["drop_channels"] > 0 and first["drop_heads"] == 0 and first["drop_layers"] == 0
    assert candidates[1]["structure"]["drop_heads"] > 0
    assert any(one["structure"]["drop_layers"] for one in candidates)
    assert all(one["removed"] >= 0.3 for one in candidates)
    least = min(candidates, key=lambda one: one["divergence"])
    assert mix["structure"] == least["structure"]
    assert 1 - parameters("small") / parameters("dense") == pytest.approx(least["removed"])
    require_same_in_transformers("small")
    assert verify(["small", "--against", "dense"]) == 0
    assert convert(["small", "small.gguf", "--type", "f32"]) == 0
    card = Path("small/README.md").read_text()
    assert "without 30 % of the decoder layers' parameters" in card
    assert "mixes" in Path("small/report.html").read_text()


def test_divergences_are_those_of_other_windows_than_the_removals(here: Path) -> None:
    model = load("dense")
    structure = Structure(drop_parameters=0.3, channel_multiple=8)
    removals: list[np.ndarray] = []

    def removing(model: Any, tokens: np.ndarray, structure: Structure) -> Any:
        removals.append(tokens)
        return remove(model, tokens, structure)[0]

    mix = chosen_mix(model, TOKENS, structure, removing)
    assert len(removals) == len(mix.candidates)
    for candidate, tokens in zip(mix.candidates, removals, strict=True):
        np.testing.assert_array_equal(tokens, TOKENS[::2])
        smaller, _ = remove(model, TOKENS[::2], candidate.structure)
        found = perplexity.text_quality([model, smaller], TOKENS[1::2])[1].kl
        assert candidate.divergence == pytest.approx(found, rel=1e-4)


def test_a_mix_without_a_finite_divergence_is_not_chosen(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compare, calls = load("dense"), perplexity.compare, list[int]()

    def broken(*given: Any) -> Any:
        found = compare(*given)
        calls.append(1)
        if len(calls) == 1:
            found[1] = dataclasses.replace(found[1], kl=float("nan"))
        return found

    monkeypatch.setattr(perplexity, "compare", broken)
    structure = Structure(drop_parameters=0.3, channel_multiple=8)
    mix = chosen_mix(model, TOKENS, structure, lambda *given: remove(*given)[0])
    assert mix.structure != mix.candidates[0].structure


@pytest.mark.parametrize("calls", [2, 3, 4])
def test_a_stopped_choice_resumes_with_the_same_bytes(
    calls: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*LINE, *SHARE, "--out"]
    assert main([*line, "whole"]) == 0
    compare, counted = perplexity.compare, list[int]()

    def counting(*given: Any, **named: Any) -> Any:
        counted.append(1)
        return compare(*given, **named)

    monkeypatch.setattr(perplexity, "compare", counting)
    assert main([*line, "other"]) == 0
    whole = len(counted)
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "compare", failing(compare, calls))
        assert main([*line, "out"]) == 2
    counted.clear()
    assert main([*line, "out", "--resume"]) == 0
    assert len(counted) == whole - (calls - 1)
    for name in ("model.safetensors", "config.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_damaged_record_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LINE, *SHARE, "--out", "small"]) == 0
    error = error_of_damaged_record(lambda removed: removed.update(mix=None), capsys)
    assert "which mix of parts was removed" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--drop-parameters 1", "at least 0 and below 1"),
        ("--drop-parameters nan", "drop"),
        ("--drop-parameters -0.1", "at least 0 and below 1"),
        ("--drop-parameters 0.999", "no mix of layers and channels has 99.9 %"),
        ("--drop-parameters 0.3 --drop-heads 0.5", "nothing else can be named"),
        ("--drop-parameters 0.3 --drop-layers layers.1", "nothing else can be named"),
    ],
)
def test_bad_values_are_refused_before_any_work(
    options: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in here.iterdir())
    for command in (main, plan):
        assert command([*LINE, *options.split(), "--out", "out"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in here.iterdir()) == before


def test_layers_go_where_channels_are_too_few(here: Path) -> None:
    assert main([*LINE, "--drop-parameters", "0.8", *SHARE[2:], "--out", "small"]) == 0
    assert 1 - parameters("small") / parameters("dense") >= 0.8


def test_a_plan_counts_the_mixes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([*LINE, *SHARE, "--out", "out"]) == 0
    rows = {line.split()[1] for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert {"mix", "channels"} <= rows
