"""Checkpoints as other programs write them, and what is in them."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import LlamaConfig

from tests.helpers import tiny

Q = gguf.GGMLQuantizationType
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    def content(tensor: np.ndarray) -> tuple:
        return tensor.dtype, tensor.shape, tensor.tobytes()

    return {name: content(t) for name, t in a.items()} == {
        name: content(t) for name, t in b.items()
    }


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Adds the tiny tokenizer's fields."""
    tokenizer = tiny.tokenizer()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(300)))
    writer.add_token_types([3] + [1] * 299)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes what was added, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    config: LlamaConfig,
    kind: gguf.GGMLQuantizationType,
    *,
    factors: np.ndarray | None = None,
) -> Path:
    """A random model as llama.cpp's converter would write it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    for name, array in tiny.weights(config).items():
        parts = name.split(".")
        if parts[1] == "layers":
            module = ".".join(parts[3:-1])
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = (
                    config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
                )
                array = (
                    array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
                )
            target = f"blk.{parts[2]}.{NAMES[module]}.weight"
        else:
            target = TOP[".".join(parts[:-1])] + ".weight"
        use = kind if array.ndim == 2 else Q.F32
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(array), use), raw_dtype=use)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    finish(writer)
    return path


def cache(folder: Path, repository: str, *, kind: str = "models") -> Path:
    """An empty snapshot in the layout of the hub's cache."""
    repo = folder / f"{kind}--{repository.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def content(folder: Path) -> dict[str, bytes | str]:
    """All that is under a folder: files by their bytes, links by what they say."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else "folder"
        )
    return found
