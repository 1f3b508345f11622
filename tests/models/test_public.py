"""Public checkpoints by their configuration: names and shapes of all tensors are those of transformers' model."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from convert.names import naming_of
from jaxprune.models import architecture_of
from tests.helpers import public
from tests.helpers.optional import needs_torch, torch

SOONER = {"SmolLM2-135M", "Qwen2.5-0.5B", "gemma-3-270m", "Phi-4-mini", "pythia-70m", "opt-350m", "EXAONE-4.0-1.2B"}


@needs_torch
@pytest.mark.parametrize(
    ("family", "name"),
    [case if case[1] in SOONER else pytest.param(*case, marks=pytest.mark.slow) for case in public.CASES],
)
def test_shapes_are_those_of_transformers(family: str, name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    written = {"model_type": family, **public.PUBLIC[family][name]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    if "lm_head.weight" in expected and family == "gpt_neox":  # as it is called inside, not in files
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    naming, spec = naming_of({"model_type": family}, ()), architecture_of(tmp_path, jnp.bfloat16).spec
    shapes = {path: t.shape[::-1] if path.endswith(".kernel") else t.shape for path, t in spec.items()}
    assert {naming.hf_name(path): shape for path, shape in shapes.items()} == expected
