"""Modules that predict tokens further on lie beside the model: they go through a run bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.names import naming_of
from jaxprune import load, prune
from jaxprune.commands.verify import main as verify
from jaxprune.methods.magnitude import Magnitude
from jaxprune.recipe import Experts, Recipe
from tests.helpers import families
from tests.helpers.optional import needs_torch

pytestmark = needs_torch


def test_they_do_not_make_names_older() -> None:
    """Of a text model inside another, names before transformers 5 are told by what is beside it."""
    config = {"model_type": "qwen3_5_text", "inside": "qwen3_5"}
    for vision, prefix in (("model.visual.x", "model.language_model."), ("visual.x", "language_model.model.")):
        naming = naming_of(config, [vision, "mtp.fc.weight", f"{prefix}norm.weight"])
        assert naming.prefix == prefix and naming.bare("mtp.fc.weight") == "beside.mtp.fc.weight"
        assert naming.hf_name(naming.bare("mtp.fc.weight")) == "mtp.fc.weight"


NAMES = {"qwen3_next": "mtp.layers.0.mlp.experts.0.up_proj.weight", "glm4_moe": "model.layers.3.eh_proj.weight"}


@pytest.mark.parametrize("family", [pytest.param("qwen3_next", marks=pytest.mark.slow), "glm4_moe"])
def test_they_go_through_a_run(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    families.save(Path("dense"), families.config(family, "plain"))
    tensors = load_file("dense/model.safetensors")
    tensors[NAMES[family]] = np.random.default_rng(0).random((24, 32), np.float32)
    save_file(tensors, "dense/model.safetensors", metadata={"format": "pt"})
    tokens = np.random.default_rng(0).integers(0, 300, (4, 40), np.int32)
    prune(load("dense"), tokens, Recipe(Magnitude(), experts=Experts(drop_experts=0.34)), "pruned")
    assert verify(["pruned", "--against", "dense"]) == 0
    np.testing.assert_array_equal(load_file("pruned/model.safetensors")[NAMES[family]], tensors[NAMES[family]])
    loaded, info = AutoModelForCausalLM.from_pretrained("pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    experts = [module for name, module in loaded.named_modules() if name.endswith(".experts")]
    assert {len(module.down_proj) for module in experts} == {4}
