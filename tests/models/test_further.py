"""Modules that predict tokens further on lie beside the model: they go through a run bit for
bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load
from safetensors.torch import save_file as torch_save

from convert import open_checkpoint
from convert.errors import UserError
from convert.names import naming_of
from jaxprune import load, prune
from jaxprune.commands.convert import main as convert
from jaxprune.commands.verify import main as verify
from jaxprune.methods.magnitude import Magnitude
from jaxprune.models import Architecture, architecture_of
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Structure
from tests.helpers import families
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch


def test_they_do_not_make_names_older() -> None:
    """Of a text model inside another, names before transformers 5 are told by what is beside it."""
    config = {"model_type": "qwen3_5_text", "inside": "qwen3_5"}
    for vision, prefix in (
        ("model.visual.x", "model.language_model."),
        ("visual.x", "language_model.model."),
    ):
        naming = naming_of(config, [vision, "mtp.fc.weight", f"{prefix}norm.weight"])
        assert naming.prefix == prefix and naming.bare("mtp.fc.weight") == "beside.mtp.fc.weight"
        assert naming.hf_name(naming.bare("mtp.fc.weight")) == "mtp.fc.weight"


def test_a_layer_too_many_is_no_module_for_multi_token_prediction(tmp_path: Path) -> None:
    families.save(tmp_path, families.config("glm4_moe", "plain"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match="surplus: all of layers.2|surplus: layers.2"):
        load(tmp_path)


def test_types_of_layers_that_transformers_passes_over_make_no_windows(tmp_path: Path) -> None:
    for family in ("llama", "olmoe", "glm4_moe", "granite"):
        config = families.config(family, next(iter(families.VARIANTS[family])))
        config.layer_types, config.sliding_window = families.TYPES, 20
        assert {kind.window for kind in architecture(config, tmp_path).config.kinds} == {None}
    config = families.config("qwen2_moe", "mixed")
    config.layer_types, config.sliding_window, config.use_sliding_window = families.TYPES, 0, False
    with pytest.raises(UserError, match="layers of type sliding_attention need sliding_window"):
        architecture(config, tmp_path)


def architecture(config: Any, folder: Path) -> Architecture:
    """Of a configuration alone."""
    config.save_pretrained(folder)
    return architecture_of(folder, np.float32)


def test_quantized_ones_are_dequantized_as_they_lie(tmp_path: Path) -> None:
    families.save(tmp_path, families.config("glm4_moe", "plain"), dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization})
    )
    values = torch.arange(24 * 32, dtype=torch.float32).reshape(24, 32).to(torch.float8_e4m3fn)
    tensors = torch_load(tmp_path / "model.safetensors")
    tensors[NAMES["glm4_moe"]], tensors[NAMES["glm4_moe"] + "_scale_inv"] = (
        values,
        torch.full((1, 1), 0.5),
    )
    torch_save(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = f"beside.{NAMES['glm4_moe']}"
    found = open_checkpoint(tmp_path).read([path])[path]
    np.testing.assert_array_equal(found.astype(np.float32), values.float().numpy() / 2)


NAMES = {
    "qwen3_next": "mtp.layers.0.mlp.experts.0.up_proj.weight",
    "glm4_moe": "model.layers.3.eh_proj.weight",
}


@pytest.mark.parametrize("family", [pytest.param("qwen3_next", marks=pytest.mark.slow), "glm4_moe"])
def test_they_go_through_a_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config(family, "plain"))
    tensors = load_file("dense/model.safetensors")
    tensors[NAMES[family]] = np.random.default_rng(0).random((24, 32), np.float32)
    save_file(tensors, "dense/model.safetensors", metadata={"format": "pt"})
    tokens = np.random.default_rng(0).integers(0, 300, (4, 40), np.int32)
    prune(
        load("dense"), tokens, Recipe(Magnitude(), structure=Structure(drop_experts=0.34)), "pruned"
    )
    assert verify(["pruned", "--against", "dense"]) == 0
    assert convert(["pruned", "orbax", "--to", "orbax"]) == 0 and convert(["orbax", "back"]) == 0
    back = load_file("back/model.safetensors")
    assert all(
        np.array_equal(back[name], tensor)
        for name, tensor in load_file("pruned/model.safetensors").items()
    )
    np.testing.assert_array_equal(
        load_file("pruned/model.safetensors")[NAMES[family]], tensors[NAMES[family]]
    )
    loaded, info = AutoModelForCausalLM.from_pretrained("pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    experts = [module for name, module in loaded.named_modules() if name.endswith(".experts")]
    assert {len(module.down_proj) for module in experts} == {4}
