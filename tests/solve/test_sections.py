"""Linear layers that lie side by side in one: each has the zeros that it would have alone."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Phi3Config

from jaxprune import ADMM, Unstructured, load, prune_layers
from jaxprune.api import snapshot as snapshots
from jaxprune.commands.prune import main as prune
from jaxprune.commands.verify import main as verify
from jaxprune.loop import LayerResult
from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.phases import prune_model
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Tuning
from jaxprune.sparsity.patterns import InProjections, by_projection, in_projections
from tests.helpers import tiny
from tests.helpers.shapes import windows

FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
TOKENS = windows(4, 32) % 300


def fused(folder: Path, apart: Path) -> Path:
    """The same model as a checkpoint of phi3, whose projections of one input are one tensor."""
    config, tensors = tiny.config(), load_file(apart / "model.safetensors")
    tiny.save(folder, config)
    same = {
        name: getattr(config, name)
        for name in tiny.config().to_dict()
        if hasattr(Phi3Config(), name)
    }
    made = Phi3Config(
        **{**same, "model_type": "phi3", "pad_token_id": 0, "architectures": ["Phi3ForCausalLM"]}
    )
    made.save_pretrained(folder)
    for layer in range(config.num_hidden_layers):
        for path, names in FUSED.items():
            room = f"model.layers.{layer}.{path.split('.')[0]}"
            parts = [tensors.pop(f"{room}.{name}.weight") for name in names]
            tensors[f"model.layers.{layer}.{path}.weight"] = np.concatenate(parts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model with separate linear layers, and with fused ones."""
    folder = tmp_path_factory.mktemp("projections")
    apart = tiny.save(folder / "apart", tiny.config())
    return apart, fused(folder / "fused", apart)


def kernels(layer: LayerResult) -> dict[str, np.ndarray]:
    """A layer's kernels; fused ones of those that lie side by side in them."""
    found = {path: layer.params[f"layers.{layer.index}.{path}.kernel"] for path in layer.kernels}
    for path, names in FUSED.items():
        room = path.split(".")[0]
        if f"{room}.{names[0]}" in found:
            found[path] = np.concatenate([found.pop(f"{room}.{name}") for name in names], axis=1)
    return found


@pytest.mark.parametrize("method", [ADMM(), SparseGPT()], ids=lambda m: type(m).__name__)
def test_fused_linear_layers_are_pruned_as_those_they_are(
    pair: tuple[Path, Path], method: Any
) -> None:
    alone, together = (
        next(iter(prune_layers(load(path), TOKENS, method, Unstructured(0.625)))) for path in pair
    )
    one, other = kernels(alone), kernels(together)
    assert one.keys() == other.keys()
    for path, kernel in one.items():
        np.testing.assert_array_equal(other[path] == 0, kernel == 0, err_msg=path)
        np.testing.assert_allclose(other[path], kernel, rtol=1e-3, atol=1e-4, err_msg=path)
    assert together["self_attn.qkv_proj"].projections == {"query": 640, "key": 320, "value": 320}
    assert together["mlp.gate_up_proj"].projections == {"gate": 960, "up": 960}


def test_gradual_zeros_are_those_of_their_projections(pair: tuple[Path, Path]) -> None:
    tuning = Tuning(tune_epochs=2, tune_rate=0.05, tune_gradual=0.05)
    recipe = Recipe(ADMM(), Unstructured(0.625), tuning=tuning)
    before = list(prune_layers(load(pair[1]), TOKENS, ADMM(), Unstructured(0.625)))
    for one, other in zip(before, prune_model(load(pair[1]), TOKENS, recipe), strict=True):
        for path in one.kernels:
            first, last = (
                layer.params[f"layers.{layer.index}.{path}.kernel"] == 0 for layer in (one, other)
            )
            projections = load(pair[1]).architecture.layers[one.index].projections.get(path, ())
            assert not np.array_equal(first, last)
            assert (
                by_projection(last.sum(axis=0), projections)
                == other[path].projections
                == one[path].projections
            )


def test_a_snapshot_knows_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = snapshots.capture(load(pair[1]), TOKENS, 1, Recipe())
    snapshots.save(tmp_path / "layer.safetensors", made)
    read = snapshots.load(tmp_path / "layer.safetensors")
    assert dict(read.projections) == dict(made.projections) and len(read.projections) == 2
    found = {
        path: result.projections
        for path, result, _, _ in snapshots.solve(read, ADMM(), Unstructured(0.5))
    }
    assert found["mlp.gate_up_proj"] == {"gate": 768, "up": 768} and not found["mlp.down_proj"]
    assert read.only("mlp.down_proj").projections == {}


def test_zeros_that_moved_to_another_projection_are_noticed(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", TOKENS)
    line = (
        f"--ckpt {pair[1]} --method magnitude --calib ids.npy --nsamples 4 --seqlen 32 --eval none "
        "--out pruned"
    )
    assert prune(line.split()) == 0 and verify(["pruned"]) == 0
    record = json.loads(Path("pruned/jaxprune.json").read_text())["layers"][0]["kernels"]
    assert record["self_attn.qkv_proj"]["projections"] == {"query": 512, "key": 256, "value": 256}
    assert record["mlp.down_proj"]["projections"] == {}
    tensors = load_file("pruned/model.safetensors")
    gate, up = np.split(tensors["model.layers.0.mlp.gate_up_proj.weight"], 2)
    where, to = np.argwhere(gate == 0)[0], np.argwhere(up != 0)[0]
    gate[*where], up[*to] = 1.0, 0.0
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
    save_file(tensors, "pruned/model.safetensors", metadata={"format": "pt"})
    assert verify(["pruned"]) == 1
    printed = capsys.readouterr()
    assert (
        "{'gate': 767, 'up': 769} zeros, not {'gate': 768, 'up': 768}" in printed.out + printed.err
    )


@pytest.mark.parametrize(
    ("widths", "outputs", "sparsity"),
    [((8, 4, 4), 16, 0.5), ((4, 4, 4), 24, 0.61), ((1, 1), 10, 0.0), ((3, 5), 8, 0.99)],
)
def test_each_projection_has_its_share(
    widths: tuple[int, ...], outputs: int, sparsity: float
) -> None:
    scores = np.random.default_rng(0).random((10, outputs), np.float32)
    projections = tuple((f"{index}", width) for index, width in enumerate(widths))
    pattern = in_projections(Unstructured(sparsity), projections)
    assert isinstance(pattern, InProjections)
    steps = [0.1, 0.5, 0.9, 1.0]
    selector, owner = (
        pattern.selector(scores.shape, steps),
        np.repeat(np.arange(len(widths)), widths),
    )
    select = jax.jit(lambda selector, scores, step: selector(scores, step))
    before = np.zeros(len(widths), int)
    for step in range(len(steps)):
        mask = np.asarray(select(selector, scores, step))
        zeros = by_projection((~mask).sum(axis=0), projections)
        for index, count in enumerate(zeros.values()):
            columns = np.resize(owner, outputs) == index
            assert abs(count - sparsity * steps[step] * 10 * columns.sum()) <= 1
            assert count >= before[index]
            before[index] = count
            kept, gone = scores[:, columns][mask[:, columns]], scores[:, columns][~mask[:, columns]]
            assert not gone.size or not kept.size or gone.max() < kept.min()
    assert sum(zeros.values()) == round(sparsity * scores.size) == pattern.zeros(scores.shape)
    within = np.diff(np.asarray(selector.zeros), axis=0, prepend=0)
    room = (
        np.diff(steps, prepend=0)[:, None]
        * 10
        * np.array([np.resize(owner, outputs) == i for i in set(owner)]).sum(1)
    )
    # no step wants more than the inputs that it is about have
    assert (within <= np.round(room)).all()
    added = np.cumsum(np.asarray(selector.increments().zeros), axis=0)
    np.testing.assert_array_equal(added, np.asarray(selector.zeros))
