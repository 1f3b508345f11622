"""Tiny random checkpoints with experts, made without PyTorch: plain, in fp8, in MXFP4, and as a
GGUF file."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from convert.names import naming_of
from convert.stored import tensors_of, to_tensor
from jaxprune.models import architecture_of
from tests.helpers import gguf_files, tiny

CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
DTYPES = {"uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


def save(folder: Path, family: str, quantization: dict[str, Any] | None = None) -> Path:
    """Saves a checkpoint of a family; experts' kernels are quantized as is said."""
    folder.mkdir()
    config = {"model_type": family, "dtype": "bfloat16", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    generator, naming = np.random.default_rng(0), naming_of(config, ())
    params = {
        path: (0.2 * generator.normal(size=tensor.shape)).astype(ml_dtypes.bfloat16)
        for path, tensor in architecture_of(folder, np.float32).spec.items()
    }
    tensors: dict[str, np.ndarray] = {}
    for name, paths in tensors_of(params, naming).items():
        array, method = (
            np.ascontiguousarray(to_tensor(paths, params, naming)),
            (quantization or {}).get("quant_method"),
        )
        if method == "fp8" and ".experts." in name:
            tensors[name] = array.astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = np.full(
                [size // 16 for size in array.shape], 0.5, np.float32
            )
        elif method == "mxfp4" and name.endswith("_proj") and ".experts." in name:
            experts, n_in, n_out = array.shape
            tensors[f"{name}_blocks"] = generator.integers(
                0, 256, (experts, n_out, n_in // 32, 16), np.uint8
            )
            tensors[f"{name}_scales"] = np.full((experts, n_out, n_in // 32), 125, np.uint8)
        else:
            tensors[name] = array
    if quantization:
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
    write(folder / "model.safetensors", tensors)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file; the library's writer for NumPy knows no fp8."""
    header, data = {}, b""
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        start, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save_gguf(path: Path, folder: Path) -> Path:
    """Saves a GGUF file with experts, in float32."""
    save(folder, "qwen3_moe")
    entries = CONFIG | {
        "model_type": "qwen3_moe",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e4},
    }
    entries["rope_parameters"] |= {"rope_type": "default"}
    return gguf_files.write(path, folder, SimpleNamespace(**entries), "qwen3moe")
