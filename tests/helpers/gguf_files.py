"""GGUF files of tiny random models of several families, as llama.cpp's converter would write
them."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.helpers import families
from tests.helpers.checkpoints import add_tokenizer, finish
from tests.helpers.optional import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WINDOW = {"sliding_window": 20}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
FACTORS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
EXPERTS_OF = families.EXPERTS | {"norm_topk_prob": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "mixtral": ("llama", {**EXPERTS_OF, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3moe", {**EXPERTS_OF, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "gemma3",
        {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "rope_parameters": ROPES},
    ),
    "phi3": ("phi3", WINDOW),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", FACTORS),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
}
"""Family -> the architecture of its files, and entries of its configuration."""
EXPERT = re.compile(r"(.*)\.experts\.([0-9]+)\.(\w+)")


def write(path: Path, folder: Path, config: Any, architecture: str) -> Path:
    """Writes the checkpoint of a folder.

    Args:
        path: the file to write.
        folder: with model.safetensors.
        config: of transformers' class.
        architecture: as the file is to call it.
    """
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    _fields(writer, config)
    add_tokenizer(writer)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in load_file(folder / "model.safetensors").items():
        array = array.astype(np.float32)
        module, _, leaf = name.rpartition(".")
        if match := EXPERT.fullmatch(module):
            parent, number, last = match.groups()
            stacks.setdefault(f"{table.get_name(f'{parent}.experts.{last}')}.{leaf}", {})[
                int(number)
            ] = array
            continue
        if re.search(r"\.[qk]_proj$", module) and config.model_type in (
            "llama",
            "mixtral",
            "granite",
            "smollm3",
        ):
            heads = (
                config.num_attention_heads
                if module.endswith("q_proj")
                else config.num_key_value_heads
            )
            array = (
                array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        if module.endswith("norm") and config.model_type.startswith("gemma"):
            array = array + np.float32(1)
        writer.add_tensor(f"{table.get_name(module)}.{leaf}", np.ascontiguousarray(array))
    for name, experts in stacks.items():
        writer.add_tensor(name, np.stack([experts[number] for number in sorted(experts)]))
    finish(writer)
    return path


def _fields(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def tensors(model: Any) -> dict[str, np.ndarray]:
    """All of a PyTorch module's tensors by name; a tied head is left out."""
    assert torch
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in tied}
