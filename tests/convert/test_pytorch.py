"""Flax params as a PyTorch module, without a file between."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from convert import CheckpointError, open_checkpoint
from convert.pytorch import to_torch
from tests.helpers import families, tiny
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_transformers_loads(tied: bool, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save(
        tmp_path / "model", tiny.config(tie_word_embeddings=tied, attention_bias=True), dtype=dtype
    )
    reader = open_checkpoint(folder)
    made = to_torch(reader.read(reader.spec), reader.assets, dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    assert made.dtype == getattr(torch, dtype) and not made.training
    assert made.state_dict().keys() == expected.state_dict().keys()
    assert all(
        torch.equal(tensor, made.state_dict()[name])
        for name, tensor in expected.state_dict().items()
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(made(tokens).logits, expected(tokens).logits)


def test_it_does_not_share_memory_with_the_params(checkpoint: Path) -> None:
    reader = open_checkpoint(checkpoint)
    params = {path: np.array(array) for path, array in reader.read(reader.spec).items()}
    made = to_torch(params, reader.assets, "float32")
    params["norm.scale"][:] = 0
    assert made.model.norm.weight.abs().sum() > 0


def test_params_of_another_model_are_refused(checkpoint: Path) -> None:
    reader = open_checkpoint(checkpoint)
    params = reader.read(reader.spec)
    params["layers.9.mlp.up_proj.kernel"] = params.pop("layers.1.mlp.up_proj.kernel")
    with pytest.raises(CheckpointError, match="not those that LlamaForCausalLM needs"):
        to_torch(params, reader.assets, "float32")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    variant = next(iter(families.VARIANTS[family]))
    reference = families.save(tmp_path, families.config(family, variant))
    reader = open_checkpoint(tmp_path)
    found = to_torch(reader.read(reader.spec), tmp_path, "float32").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(found[name], tensor), name
