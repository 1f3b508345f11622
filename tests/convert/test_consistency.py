"""Whether a checkpoint agrees with itself and its configuration."""

from pathlib import Path

import numpy as np
import pytest

from convert import CheckpointError, Spec
from convert.assets import read_config
from convert.consistency import check
from jaxprune.models import architecture_of
from tests.helpers import families


def spec_of(family: str, variant: str, folder: Path) -> Spec:
    """Writes config.json to the folder; returns the shapes and dtypes of a checkpoint that fits
    it."""
    families.config(family, variant).save_pretrained(folder)
    return dict(architecture_of(folder, np.float32).spec)


@pytest.mark.parametrize(("family", "variant"), families.CASES)
def test_a_complete_checkpoint_of_every_family_passes(
    family: str, variant: str, tmp_path: Path
) -> None:
    spec = spec_of(family, variant, tmp_path)
    check(spec, read_config(tmp_path))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("layers.0.linear_attn.A_log", r"missing: layers\.0\.linear_attn\.A_log"),
        ("layers.1.linear_attn.", r"missing: layers\.1\.self_attn\.q_proj\.kernel"),
        ("layers.2.self_attn.", r"missing: layers\.2\.self_attn\.q_proj\.kernel"),
        ("layers.3.self_attn.q_proj.", r"missing: layers\.3\.self_attn\.q_proj\.kernel"),
        ("layers.1.mlp.up_proj.", r"missing: layers\.1\.mlp\.up_proj\.kernel"),
    ],
)
def test_tensors_missing_from_a_layer_of_either_kind_are_named(
    removed: str, message: str, tmp_path: Path
) -> None:
    types = ["linear_attention", "linear_attention", "full_attention", "full_attention"]
    config = families.config("qwen3_5_text", "tied", num_hidden_layers=4, layer_types=types)
    config.save_pretrained(tmp_path)
    whole = architecture_of(tmp_path, np.float32).spec
    check(whole, read_config(tmp_path))
    spec = {path: tensor for path, tensor in whole.items() if not path.startswith(removed)}
    assert len(spec) < len(whole)
    with pytest.raises(CheckpointError, match=message):
        check(spec, read_config(tmp_path))
