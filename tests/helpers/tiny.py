"""Small random checkpoints and text; PyTorch is imported for `model` alone."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "a the cat dog sat ran on under mat house and then it was very big small old new red blue tree"
).split()


def config(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaConfig(**options | changes)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes that LlamaForCausalLM saves."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    linears = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        for name, shape in linears.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
            if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
                found[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = (width,)
    found["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    return found


def weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors, every one of which matters: norms and biases are not at their neutral
    start."""
    generator = np.random.default_rng(seed)
    return {
        name: (("norm" in name) + 0.3 * generator.normal(size=shape)).astype(np.float32)
        for name, shape in shapes(config).items()
    }


def model(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """transformers' own model with the same weights."""
    import torch

    made = LlamaForCausalLM(config).eval()
    found = {name: torch.from_numpy(array) for name, array in weights(config, seed).items()}
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    made.load_state_dict(found)
    return made


def save(
    folder: Path, config: LlamaConfig, *, dtype: str = "float32", max_shard_size: str = "1GB"
) -> Path:
    """Saves a random model, laid out as transformers does it, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.dtype, config.architectures = dtype, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in weights(config).items()}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens, trained on the words of `write_text`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(sentences(random.Random(0), 500), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


def sentences(generator: random.Random, count: int) -> list[str]:
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(3, 12))).capitalize() + "."
        for _ in range(count)
    ]


def write_text(path: Path, documents: int, seed: int = 1) -> None:
    generator = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(sentences(generator, generator.randint(1, 30)))
            file.write(json.dumps({"text": text}) + "\n")
