"""Removal of whole layers: which ones are chosen, and the ordinary checkpoint of the family that
results."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import open_checkpoint
from jaxprune import Magnitude, Recipe, load, prune
from jaxprune.commands.convert import main as convert
from jaxprune.commands.plan import main as plan
from jaxprune.commands.prune import main
from jaxprune.commands.verify import main as verify
from jaxprune.evaluation import perplexity
from jaxprune.recipe_parts import Structure
from jaxprune.sparsity.patterns import NO_ZEROS
from jaxprune.structure.layers import dropped_layers, without_layers
from tests.helpers import families
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch
from tests.helpers.removals import (
    LINE,
    WINDOWS,
    error_of_damaged_record,
    require_same_in_transformers,
)

pytestmark = needs_torch
FAST = {
    ("llama", "plain"),
    ("gemma2", "plain"),
    ("qwen3_moe", "mixed"),
    ("smollm3", "plain"),
    ("glm4_moe", "plain"),
    ("qwen2", "window"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint of six layers and token ids, entered."""
    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config("llama", "plain", num_hidden_layers=6))
    np.save("ids.npy", WINDOWS)
    return tmp_path


def divergence(model: Any, other: Any) -> float:
    """The KL divergence of another model's predictions, by the definition."""
    p, q = (
        jax.nn.log_softmax(one.logits(WINDOWS)[:, :-1].astype(np.float32)) for one in (model, other)
    )
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, marks=[pytest.mark.slow] * ((family, variant) not in FAST))
        for family, variants in families.VARIANTS.items()
        for variant in variants
    ],
)
def test_transformers_computes_the_same_with_the_smaller_checkpoint(
    family: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config(family, variant))
    recipe = Recipe(Magnitude(), NO_ZEROS, structure=Structure(drop_layers="layers.1"))
    result = prune(load("dense"), WINDOWS, recipe, "small")
    assert result and result.record.removed.layers == [1]
    loaded = require_same_in_transformers("small")
    assert len(loaded.base_model.layers if family != "opt" else loaded.model.decoder.layers) == 2
    assert verify(["small", "--against", "dense"]) == 0


def test_the_layers_whose_removal_changes_predictions_least_are_chosen(here: Path) -> None:
    """One after another, each time from the models without one of the layers that are left."""
    model = load("dense")
    found = dropped_layers(model, WINDOWS, Structure(drop_layers=2))
    dropped: list[int] = []
    for chosen, measured in zip(found.layers, found.divergences, strict=True):
        candidates = {
            index: divergence(model, without_layers(model, [*dropped, index]))
            for index in range(6)
            if index not in dropped
        }
        assert chosen == min(candidates, key=candidates.__getitem__)
        assert measured == pytest.approx(candidates[chosen], rel=1e-3)
        dropped.append(chosen)


def test_named_layers_are_removed_and_the_others_stay_as_they_are(here: Path) -> None:
    assert main([*LINE, "--drop-layers", "layers.4,layers.1", "--out", "small"]) == 0
    config = json.loads(Path("small/config.json").read_text())
    assert config["num_hidden_layers"] == 4
    dense, small = open_checkpoint("dense"), open_checkpoint("small")
    for place, index in enumerate([0, 2, 3, 5]):
        for path in small.spec:
            if path.startswith(f"layers.{place}."):
                whole = path.replace(f"layers.{place}.", f"layers.{index}.", 1)
                array = dense.read([whole])[whole].astype(small.spec[path].dtype)
                np.testing.assert_array_equal(small.read([path])[path], array)
    record = json.loads(Path("small/jaxprune.json").read_text())
    assert record["removed"]["layers"] == [1, 4] and record["removed"]["divergences"] == []
    card = Path("small/README.md").read_text()
    assert "# dense, without 2 layers" in card and "1, 4" in card
    assert "sparse" not in card and "zeros" not in card


def test_all_removals_and_zeros_work_together(here: Path) -> None:
    removed = "--drop-layers 2 --drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8".split()
    line = [*LINE, *removed, "--skip", "layers.0.*", "--sparsity", "0.5", "--method", "magnitude"]
    assert main([*line, "--out", "small"]) == 0
    config = json.loads(Path("small/config.json").read_text())
    sizes = [config[name] for name in ("num_hidden_layers", "intermediate_size")]
    assert sizes == [4, 32] and config["num_key_value_heads"] == 1
    paths = [f"layers.{index}.mlp.up_proj.kernel" for index in range(4)]
    small = open_checkpoint("small").read(paths)
    zeros = [float((small[path] == 0).mean()) for path in paths]
    assert "without 2 layers and 50 % of heads and 34 % of" in Path("small/README.md").read_text()
    assert zeros == [0, *[pytest.approx(0.5, abs=0.01)] * 3]
    assert verify(["small", "--against", "dense"]) == 0
    assert main([*LINE, "--config", "small/jaxprune.json", "--out", "again"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert Path("again", name).read_bytes() == Path("small", name).read_bytes()


@pytest.mark.parametrize("calls", [3, 5])
def test_a_stopped_run_resumes_with_the_same_bytes(
    calls: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two steps compare their candidates in two calls each, the third in one."""
    line = [*LINE, "--drop-layers", "3", "--out"]
    assert main([*line, "whole"]) == 0
    compare = perplexity.compare
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "compare", failing(compare, calls))
        assert main([*line, "out"]) == 2
    counted: list[int] = []

    def counting(*given: Any, **named: Any) -> Any:
        counted.append(1)
        return compare(*given, **named)

    monkeypatch.setattr(perplexity, "compare", counting)
    assert main([*line, "out", "--resume"]) == 0
    assert len(counted) == 6 - calls
    for name in ("model.safetensors", "config.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize(
    ("structure", "goes"),
    [
        (Structure(drop_layers=1), True),
        (Structure(drop_channels=0.34, channel_multiple=8), True),
        (Structure(drop_experts=0.5), False),
    ],
    ids=["layers", "channels", "experts"],
)
def test_a_module_for_multi_token_prediction_goes_where_sizes_change(
    structure: Structure, goes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    monkeypatch.chdir(tmp_path)
    config = families.config("glm4_moe", "plain", num_nextn_predict_layers=1)
    families.save(Path("dense"), config)
    tensors = load_file("dense/model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = np.ones((32, 64), np.float32)
    save_file(tensors, "dense/model.safetensors", metadata={"format": "pt"})
    result = prune(
        load("dense"), WINDOWS, Recipe(Magnitude(), NO_ZEROS, structure=structure), "small"
    )
    assert result and result.record.removed.predictors == ["model.layers.3"] * goes
    assert ("model.layers.3.eh_proj.weight" in load_file("small/model.safetensors")) != goes
    config = json.loads(Path("small/config.json").read_text())
    assert config["num_nextn_predict_layers"] == (0 if goes else 1)
    assert ("model.layers.3" in Path("small/README.md").read_text()) == goes
    assert verify(["small", "--against", "dense"]) == 0


@pytest.mark.parametrize("layers", [[], [1, 1], [1, 9], [1, 2, 3]])
def test_a_damaged_record_is_refused_in_one_line(
    layers: list[int], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LINE, "--drop-layers", "2", "--out", "small"]) == 0
    error = error_of_damaged_record(lambda removed: removed.update(layers=layers), capsys)
    assert "which layers were removed" in error


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("6", "the model has 6 layers, and at least one must stay"),
        ("99999999999999999999", "layers"),
        ("-1", "must not be negative"),
        ("0.5", "a number of layers, or names such as layers.4,layers.7, not '0.5'"),
        ("nan", "a number of layers, or names"),
        ("", "drop-layers"),
        ("layers.6", "there is no layers.6: the model's last layer is layers.5"),
        ("layers.1,layers.1", "names a layer twice"),
        ("layers.1,", "a number of layers, or names"),
        ("layers.01", "a number of layers, or names"),
        ("layers.0,layers.1,layers.2,layers.3,layers.4,layers.5", "at least one must stay"),
    ],
)
def test_bad_values_are_refused_before_any_work(
    value: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir())
    for command in (main, plan):
        assert command([*LINE, "--drop-layers", value, "--out", "out"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(os.listdir()) == before


def test_a_plan_counts_the_choice_but_not_the_removal_of_named_layers(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan([*LINE, "--drop-layers", "2", "--out", "out"]) == 0
    assert "layers" in capsys.readouterr().out.split()
    assert plan([*LINE, "--drop-layers", "layers.2", "--out", "out"]) == 0
    assert "layers" not in {
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()
    }


@pytest.mark.parametrize(
    ("dropped", "told"),
    [
        ("2", "name layers of whole periods"),
        ("layers.1", "no GGUF file can be made"),
        ("layers.4,layers.5,layers.6,layers.7", None),
        ("layers.2,layers.3,layers.4,layers.5", None),
    ],
)
def test_a_plan_tells_where_a_gguf_file_cannot_be_made(
    dropped: str,
    told: str | None,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = families.config(
        "smollm3", "plain", num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0] * 2
    )
    families.save(Path("alternating"), config)
    line = ["--ckpt", "alternating", *LINE[2:], "--drop-layers", dropped, "--out", "out"]
    assert plan(line) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert told in printed if told else "GGUF" not in printed
    plan([*line, "--target", "h100"])
    printed = " ".join(capsys.readouterr().out.split())
    assert told in printed if told else "GGUF" not in printed
    if dropped != "2":
        assert main(line) == 0
        assert convert(["out", "out.gguf", "--type", "f32"]) == (2 if told else 0)
        assert ("no_rope_layers" in capsys.readouterr().err) == bool(told)
