"""GGUF files against what transformers loads from them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from convert import CheckpointError, open_checkpoint
from convert.__main__ import main
from convert.assets import load_tokenizer, read_config
from jaxprune.models import model_for
from jaxprune.models._rope import Rope
from tests import tiny
from tests.optional import needs_torch, torch

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
Q = gguf.GGMLQuantizationType


def write(
    path: Path, config: LlamaConfig, kind: gguf.GGMLQuantizationType, *, factors: np.ndarray | None = None
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
    tokenizer = tiny.tokenizer()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(300)))
    writer.add_token_types([3] + [1] * 299)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, array in tiny.weights(config).items():
        parts = name.split(".")
        if parts[1] == "layers":
            module = ".".join(parts[3:-1])
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            target = f"blk.{parts[2]}.{NAMES[module]}.weight"
        else:
            target = TOP[".".join(parts[:-1])] + ".weight"
        use = kind if array.ndim == 2 else Q.F32
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(array), use), raw_dtype=use)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_torch
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The given NumPy array is not writable")
def test_tensors_and_tokens_are_those_of_transformers(
    kind: gguf.GGMLQuantizationType, tied: bool, tmp_path: Path
) -> None:
    config = tiny.config(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    path = write(tmp_path / "model.gguf", config, kind)
    assert main([str(path), str(tmp_path / "hf")]) == 0
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = reference.state_dict()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")("The cat sat.")["input_ids"]
    assert load_tokenizer(tmp_path / "hf")("The cat sat.")["input_ids"] == ids
    assert mine.config.rms_norm_eps == 1e-5
    model_for(open_checkpoint(path))


def test_llama3_rope_factors_become_the_configuration(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny.config(head_dim=64, rope_parameters=rope)
    plain = Rope.from_hf({"rope_type": "default", "rope_theta": 500000.0}, 64, 1024).inverse_frequencies(8)[0]
    scaled = Rope.from_hf(rope, 64, 1024).inverse_frequencies(8)[0]
    reader = open_checkpoint(write(tmp_path / "a.gguf", config, Q.F32, factors=plain / scaled))
    assert read_config(reader.assets)["rope_parameters"] == rope
    other = write(tmp_path / "b.gguf", config, Q.F32, factors=np.linspace(1, 9, 32, dtype=np.float32))
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_checkpoint(other)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -100])
def test_a_damaged_file_is_one_error(keep: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", tiny.config(), Q.F32).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="no GGUF file, or a damaged one"):
        open_checkpoint(tmp_path / "cut.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'rwkv6'"):
        open_checkpoint(tmp_path / "other.gguf")
