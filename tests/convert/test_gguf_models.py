"""GGUF files of model families: what is read is what they were written from, and what transformers
reads."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert import open_checkpoint
from convert.errors import CheckpointError
from convert.gguf.models import MODELS
from convert.names import TEXT
from jaxprune import load
from tests.helpers import families, gguf_files
from tests.helpers.checkpoints import finish
from tests.helpers.gguf_files import CASES
from tests.helpers.optional import needs_torch

pytestmark = [
    needs_torch,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore:The given NumPy array is not writable"
    ),
]
LOADED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {},
    "gemma3_text": {},
}
"""Dense families that transformers reads from such files, with sizes that it takes from no field of
them."""


def made(folder: Path, family: str, **others: Any) -> tuple[Path, Any]:
    """A checkpoint in a folder, and the GGUF file of it."""
    from transformers import AutoConfig

    architecture, entries = CASES[family]
    config = AutoConfig.for_model(family, **{**families.SIZES, **entries, **others})
    families.save(folder / "hf", config)
    return gguf_files.write(folder / "model.gguf", folder / "hf", config, architecture), config


def test_every_architecture_is_tried() -> None:
    assert {architecture for architecture, _ in CASES.values()} == MODELS.keys()


@pytest.mark.parametrize("family", CASES)
def test_what_is_read_is_what_it_was_written_from(family: str, tmp_path: Path) -> None:
    file, _ = made(tmp_path, family)
    source, found = open_checkpoint(tmp_path / "hf"), open_checkpoint(file)
    assert found.spec == source.spec
    for path in source.spec:
        expected = source.read([path])[path]
        if family.startswith("gemma") and path.endswith(".scale"):
            expected = (expected + np.float32(1)) - np.float32(1)  # as the file has it
        np.testing.assert_array_equal(found.read([path])[path], expected, err_msg=path)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 60), np.int32)
    expected = load(tmp_path / "hf").logits(tokens)
    np.testing.assert_allclose(
        load(file).logits(tokens), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4
    )


@pytest.mark.parametrize("family", LOADED)
def test_tensors_are_those_that_transformers_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file, _ = made(tmp_path, family, **LOADED[family])
    theirs = gguf_files.tensors(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name))
    reader = open_checkpoint(file)
    ours = {
        TEXT.hf_name(path): array.T if path.endswith(".kernel") else array
        for path, array in reader.read(reader.spec).items()
    }
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_experts_are_those_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file, _ = made(tmp_path, "qwen3_moe", head_dim=128, moe_intermediate_size=768)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    reader = open_checkpoint(file)
    for expert in range(6):
        both = (
            theirs.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[expert].detach().numpy()
        )
        for name, expected in zip(("gate_proj", "up_proj"), np.split(both, 2), strict=True):
            path = f"layers.1.mlp.experts.{expert}.{name}.kernel"
            np.testing.assert_array_equal(reader.read([path])[path].T, expected)


def test_experts_where_the_architecture_has_none_are_an_error(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_expert_count(4)
    finish(writer)
    with pytest.raises(CheckpointError, match="qwen2 with experts"):
        open_checkpoint(tmp_path / "x.gguf")
