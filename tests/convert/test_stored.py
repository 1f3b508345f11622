"""Quantized checkpoints, and experts in one tensor: what is read, what is written, what is
refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import open_checkpoint
from convert.errors import CheckpointError
from convert.stored import from_fp8, from_mxfp4
from jaxprune.commands.prune import main as prune
from jaxprune.commands.verify import main as verify
from tests.helpers import families
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch
BLOCKS = [20, 12]
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": BLOCKS,
    "activation_scheme": "dynamic",
}
LINE = "--calib ids.npy --nsamples 2 --seqlen 40 --eval none --method wanda --out out".split()


def set_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the tensors of a checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def in_fp8(tensors: dict[str, Any]) -> None:
    """Quantizes the linear layers of decoder layers but the first."""
    for name in [
        name
        for name, t in tensors.items()
        if ".layers." in name and ".0." not in name and t.dim() == 2
    ]:
        weight = tensors[name].float()
        rows, columns = (
            -(-size // block) for size, block in zip(weight.shape, BLOCKS, strict=True)
        )
        scales = torch.rand(rows, columns) + 0.5
        whole = scales.repeat_interleave(BLOCKS[0], 0).repeat_interleave(BLOCKS[1], 1)
        tensors[name] = (weight / whole[: weight.shape[0], : weight.shape[1]]).to(
            torch.float8_e4m3fn
        )
        tensors[f"{name}_scale_inv"] = scales


def in_mxfp4(tensors: dict[str, Any]) -> None:
    """Replaces experts' kernels by random codes."""
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, n_in, n_out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, n_out, n_in // 32, 16), dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 124, (experts, n_out, n_in // 32), dtype=torch.uint8
        )


def checkpoint(folder: Path, family: str, **entries: Any) -> Path:
    """A checkpoint in bfloat16."""
    variant = next(iter(families.VARIANTS[family]))
    families.save(folder, families.config(family, variant, **entries), dtype="bfloat16")
    return folder


@pytest.fixture
def fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (2, 40)))
    folder = checkpoint(tmp_path / "dense", "qwen3", num_hidden_layers=2)
    rewrite(folder, in_fp8)
    set_config(folder, quantization_config=FP8)
    return folder


@pytest.fixture
def mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (2, 40)))
    types = ["sliding_attention", "full_attention"]
    folder = checkpoint(
        tmp_path / "dense", "gpt_oss", intermediate_size=64, num_hidden_layers=2, layer_types=types
    )
    rewrite(folder, in_mxfp4)
    set_config(
        folder,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.norm"]},
    )
    return folder


def test_fp8_is_dequantized_as_torch_does() -> None:
    weight = torch.randn(45, 31).mul(30).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.1
    whole = scales.repeat_interleave(20, 0).repeat_interleave(12, 1)[:45, :31]
    expected = (weight.float() * whole).to(torch.bfloat16).float().numpy()
    found = from_fp8(weight.view(torch.uint8).numpy(), scales.numpy(), BLOCKS)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_mxfp4_is_dequantized_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(codes, exponents).float().numpy()
    for expert in range(3):
        found = from_mxfp4(codes[expert].numpy(), exponents[expert].numpy())
        np.testing.assert_array_equal(found.T.astype(np.float32), expected[expert])


def pruned_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> Any:
    """Prunes, and returns what transformers loads of it."""
    from transformers import AutoModelForCausalLM

    assert prune(["--ckpt", "dense", *LINE]) == 0
    assert f"is in {method}" in " ".join(capsys.readouterr().err.split())
    assert verify(["out", "--against", "dense"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    return model


def test_a_checkpoint_in_fp8_is_pruned_to_one_in_bfloat16(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = open_checkpoint(fp8)
    assert {tensor.dtype for tensor in reader.spec.values()} == {np.dtype(ml_dtypes.bfloat16)}
    model = pruned_and_loaded(tmp_path, capsys, "fp8")
    path = "layers.1.mlp.down_proj.kernel"
    dense = reader.read([path])[path].astype(np.float32)
    found = model.model.layers[1].mlp.down_proj.weight.float().detach().numpy().T
    assert np.array_equal(found[found != 0], dense[found != 0]) and (found == 0).mean() == 0.5


def test_a_checkpoint_in_mxfp4_is_pruned_to_one_in_bfloat16(
    mxfp4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(mxfp4 / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = (
        convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        .float()
        .numpy()
    )
    model = pruned_and_loaded(tmp_path, capsys, "mxfp4")
    found = model.model.layers[1].mlp.experts.gate_up_proj.float().detach().numpy()
    assert found.shape == expected.shape
    assert (
        np.array_equal(found[found != 0], expected[found != 0]) and 0.5 <= (found == 0).mean() < 0.6
    )


def without_scales(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]


def with_fewer_scales(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:1]


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_scales, "there are none"), (with_fewer_scales, "needs block scales")],
)
def test_scales_that_do_not_fit_are_named(
    fp8: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    rewrite(fp8, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(fp8)
    assert "layers.1.mlp.up_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"bits": 4}, "unknown"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": ["fp8"]}, "quantized"),
    ],
)
def test_other_formats_are_refused(fp8: Path, entry: dict[str, Any], words: str) -> None:
    set_config(fp8, quantization_config=entry)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(fp8)


def test_fp8_without_its_entry_is_refused(fp8: Path) -> None:
    set_config(fp8, quantization_config=None)
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        open_checkpoint(fp8)


def cut_exponents(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1]


def flat_experts(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    tensors[name] = tensors[name].flatten(2)


@pytest.mark.parametrize(
    ("change", "words"), [(cut_exponents, "does not fit"), (flat_experts, "4 axes")]
)
def test_blocks_that_do_not_fit_are_named(
    mxfp4: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    rewrite(mxfp4, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(mxfp4)
