"""Removal of heads and channels through a whole run: an ordinary checkpoint of the family results,
and what reads the removed units is re-optimized."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import open_checkpoint
from jaxprune import Magnitude, Recipe, Unstructured, load, prune
from jaxprune.commands.convert import main as convert
from jaxprune.commands.plan import main as plan
from jaxprune.commands.prune import main
from jaxprune.commands.verify import main as verify
from jaxprune.recipe_parts import Structure
from jaxprune.solve import gram_matrices
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.sensitivity import measure_sensitivity
from jaxprune.sparsity.patterns import NO_ZEROS
from jaxprune.structure import removal as removing
from jaxprune.structure.input_groups import remove_inputs
from jaxprune.structure.removal import removal_from, remove_units
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
STRUCTURES = {
    "heads": Structure(drop_heads=0.5),
    "channels": Structure(drop_channels=0.34, channel_multiple=8),
    "both": Structure(drop_heads=0.5, drop_channels=0.34, channel_multiple=8),
}
SIZES = {"heads": {"num_key_value_heads": 1}, "channels": {"intermediate_size": 32}}
SIZES["both"] = SIZES["heads"] | SIZES["channels"]


def some(*cases: str) -> Any:
    """Families with a kind of removal, the first of which is always tested."""
    return [
        pytest.param(*case.split(" / "), marks=[pytest.mark.slow] * (number > 5))
        for number, case in enumerate(cases)
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint of LLaMA's family and token ids, entered."""
    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config("llama", "plain"))
    np.save("ids.npy", WINDOWS)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "variant", "kind"),
    some(
        "llama / plain / both",
        "phi3 / window / heads",
        "gemma2 / plain / both",
        "qwen3_moe / mixed / channels",
        "gpt_oss / plain / heads",
        "opt / plain / channels",
        "olmo2 / bias / both",
        "qwen2 / window / both",
        "cohere2 / bias / both",
        "gpt_oss / plain / channels",
        "qwen2_moe / mixed / both",
        "glm4_moe / two shared / both",
        "qwen3_next / plain / both",
        "gpt_neox / in turn / channels",
        "seed_oss / output bias / both",
        "mixtral / plain / channels",
    ),
)
def test_transformers_computes_the_same_with_the_smaller_checkpoint(
    family: str, variant: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config(family, variant))
    recipe = Recipe(Magnitude(), NO_ZEROS, structure=STRUCTURES[kind])
    result = prune(load("dense"), WINDOWS, recipe, "small")
    assert result and result.sparsity == 0
    sizes = result.record.parameters
    assert sizes["pruned"] < sizes["dense"]
    require_same_in_transformers("small")
    assert verify(["small", "--against", "dense"]) == 0
    config = json.loads(Path("small/config.json").read_text())
    size = load("dense").architecture.config.head_dim
    assert config.get("head_dim") in ([None] * (kind == "channels") + [size])


def test_readers_are_optimal_on_the_inputs_of_the_smaller_model(here: Path) -> None:
    """In order through the layers, by hand: the Gram matrix of what the smaller layers before give
    and the gradients of the whole model decide which channels of a layer stay, and what reads
    them."""
    model = load("dense")
    units_asked = [(("mlp_hidden", 48),)] * model.num_layers
    sensitivities = measure_sensitivity(model, WINDOWS, units=units_asked)
    removal = removal_from(model, "channels", STRUCTURES["channels"])
    smaller, units = remove_units(model, WINDOWS, removal)
    states = CalibrationStates(model, WINDOWS, with_dense=False)
    for index in range(model.num_layers):
        layer = model.architecture.layers[index]
        (params,) = model.layers([index])
        on_device = model.put_layer(index, params)
        grams, _ = gram_matrices.gram_matrices(states, index, on_device)
        (capture,) = [name for name, readers in layer.inputs.items() if "mlp.down_proj" in readers]
        kernel = jnp.asarray(layer.unstack(params)["mlp.down_proj.kernel"])
        changes = jnp.asarray(sensitivities[index].units[capture])
        kept, weights, error = remove_inputs(grams.take(capture), kernel, changes, 32)
        (small,) = smaller.layers([index])
        small = removal.after.layers[index].unstack(small)
        np.testing.assert_allclose(small["mlp.down_proj.kernel"], weights, rtol=1e-4, atol=1e-5)
        whole = layer.unstack(params)
        np.testing.assert_array_equal(
            small["mlp.up_proj.kernel"], whole["mlp.up_proj.kernel"][:, kept]
        )
        assert units.errors[str(index)]["mlp.down_proj"] == pytest.approx(error, rel=1e-3)
        smaller.forward(
            index, smaller.put_layer(index, removal.after.layers[index].stack(small)), states.pruned
        )


def test_what_remains_predicts_better_than_what_the_largest_weights_leave(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def divergence(folder: str) -> float:
        p, q = (jax.nn.log_softmax(load(one).logits(WINDOWS), axis=-1) for one in ("dense", folder))
        return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))

    def largest(gram: Any, kernel: Any, changes: Any, keep: int) -> Any:
        groups = len(changes)
        norms = np.linalg.norm(np.asarray(kernel).reshape(groups, -1), axis=1)
        kept = np.sort(np.argsort(-norms)[:keep])
        rows = np.asarray(kernel).reshape(groups, len(kernel) // groups, -1)[kept]
        return kept, jnp.asarray(rows.reshape(-1, kernel.shape[1])), 0.0

    recipe = Recipe(Magnitude(), NO_ZEROS, structure=STRUCTURES["both"])
    prune(load("dense"), WINDOWS, recipe, "small")
    monkeypatch.setattr(removing, "remove_inputs", largest)
    prune(load("dense"), WINDOWS, recipe, "largest")
    assert divergence("small") < 0.8 * divergence("largest")


@pytest.mark.parametrize("calls", [2, 4, 5])
def test_a_stopped_run_resumes_with_the_same_bytes(
    calls: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*LINE, *"--drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8".split()]
    line += "--sparsity 0.5 --method magnitude --out".split()
    assert main([*line, "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(removing, "remove_inputs", failing(remove_inputs, calls))
        assert main([*line, "out"]) == 2
    counted: list[int] = []

    def counting(*given: Any) -> Any:
        counted.append(1)
        return remove_inputs(*given)

    monkeypatch.setattr(removing, "remove_inputs", counting)
    assert main([*line, "out", "--resume"]) == 0
    assert len(counted) == 6 - (calls - 1)
    for name in ("model.safetensors", "config.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert verify(["out", "--against", "dense"]) == 0


def test_a_removal_alone_makes_no_zeros_and_one_with_a_sparsity_does(here: Path) -> None:
    removed = "--drop-channels 0.34 --channel-multiple 8".split()
    assert main([*LINE, *removed, "--out", "alone"]) == 0
    assert main([*LINE, *removed, "--preset", "fast", "--tune-windows", "2", "--out", "fast"]) == 0
    assert main([*LINE, *removed, "--sparsity", "0.5", "--out", "zeros"]) == 0
    assert main([*LINE, "--config", "alone/jaxprune.json", "--out", "again"]) == 0
    found = {
        name: open_checkpoint(name).read(["layers.1.mlp.down_proj.kernel"]).popitem()[1]
        for name in ("alone", "fast", "zeros", "again")
    }
    assert {name: float((array == 0).mean()) for name, array in found.items()} == {
        "alone": 0,
        "fast": 0,
        "zeros": pytest.approx(0.5, abs=0.01),
        "again": 0,
    }
    assert {array.shape for array in found.values()} == {(32, 32)}
    np.testing.assert_array_equal(found["alone"], found["again"])
    assert np.mean(found["alone"] != found["fast"]) > 0.9  # tuned
    for name in found:
        assert verify([name, "--against", "dense"]) == 0


def test_layers_that_a_rule_skips_lose_units_but_are_not_tuned(here: Path) -> None:
    removed = "--drop-channels 0.34 --channel-multiple 8".split()
    assert main([*LINE, *removed, "--out", "alone"]) == 0
    tuned = "--preset fast --tune-windows 2 --skip layers.1.mlp.down_proj --out tuned".split()
    assert main([*LINE, *removed, *tuned]) == 0
    paths = [f"layers.{index}.mlp.down_proj.kernel" for index in (0, 1)]
    alone, changed = (open_checkpoint(name).read(paths) for name in ("alone", "tuned"))
    assert [np.array_equal(alone[path], changed[path]) for path in paths] == [False, True]
    assert verify(["tuned", "--against", "dense"]) == 0


def test_another_format_of_the_smaller_checkpoint_holds_the_same(here: Path) -> None:
    removed = "--drop-heads 0.5 --drop-channels 0.34 --channel-multiple 32".split()
    assert main([*LINE, *removed, "--out", "small"]) == 0
    assert convert(["small", "small.gguf", "--type", "f32"]) == 0
    assert convert(["small", "orbax", "--to", "orbax"]) == 0
    expected = load("small").logits(WINDOWS)
    for name in ("small.gguf", "orbax"):
        np.testing.assert_allclose(load(name).logits(WINDOWS), expected, rtol=1e-4, atol=1e-4)


def test_a_changed_slice_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    removed = "--drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8".split()
    assert main([*LINE, *removed, "--out", "small"]) == 0
    file = Path("small/model.safetensors")
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        tensors = load_file(file)
        changed = dict(tensors)
        changed[f"model.layers.1.{name}.weight"] = tensors[f"model.layers.1.{name}.weight"] * 1.01
        save_file(changed, file, metadata={"format": "pt"})
        capsys.readouterr()
        assert verify(["small", "--against", "dense"]) == 1
        assert f"layers.1.{name}" in "".join(capsys.readouterr())
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda units: units.clear(),
        lambda units: units["heads"]["kept"].pop("1"),
        lambda units: units["heads"]["kept"]["1"].clear(),
        lambda units: units["heads"]["kept"]["1"].update(attention_output="!"),
        lambda units: units["heads"]["kept"]["1"].update(attention_output="AA=="),
    ],
    ids=["no units", "no layer", "no input", "no base64", "none kept"],
)
def test_a_damaged_record_is_refused_in_one_line(
    damage: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LINE, "--drop-heads", "0.5", "--out", "small"]) == 0
    error = error_of_damaged_record(lambda removed: damage(removed["units"]), capsys)
    assert "jaxprune.json" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--drop-channels 0 --channel-multiple 0", "channel_multiple must be at least 1"),
        ("--drop-channels 1", "below 1"),
        ("--drop-channels nan", "nan is no finite number"),
        ("--drop-channels 0.5", "intermediate_size is 48: no smaller multiple of 64 is left"),
        ("--drop-channels -0.5", "at least 0"),
        ("--drop-heads 1", "below 1"),
        ("--drop-heads x", "drop-heads"),
        ("--drop-heads 0.5 --ckpt=opt", "heads cannot remain in a model of this family"),
        ("--drop-heads 0.5 --mask from-checkpoint:dense", "mask"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    options: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = LINE
    if "--ckpt=opt" in options:
        families.save(Path("opt"), families.config("opt", "plain"))
        line = LINE[2:]
    before = sorted(os.listdir())
    for command in (main, plan):
        assert command([*line, *options.split(), "--out", "out"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(os.listdir()) == before


def test_a_plan_counts_the_removal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8 --out out".split()
    assert plan([*LINE, *line]) == 0
    told = capsys.readouterr().out
    assert {"heads", "channels"} <= {*told.split()}


def test_zeros_are_made_in_what_remains(here: Path) -> None:
    recipe = Recipe(Magnitude(), Unstructured(0.5), structure=STRUCTURES["both"])
    result = prune(load("dense"), WINDOWS, recipe, "small")
    assert result and result.sparsity == pytest.approx(0.5, abs=0.001)
    assert result.layers[1]["mlp.down_proj"].size == 32 * 32
