"""Small random checkpoints and text, made by transformers and tokenizers."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "a the cat dog sat ran on under mat house and then it was very big small old new red blue tree".split()


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


def model(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """A random model whose every tensor matters: norms and biases are not at their neutral start."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    return made


def save(folder: Path, config: LlamaConfig, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves a random model and a tokenizer."""
    model(config).to(dtype).save_pretrained(folder, **options)
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
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))).capitalize() + "." for _ in range(count)]


def write_text(path: Path, documents: int, seed: int = 1) -> None:
    generator = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(sentences(generator, generator.randint(1, 30)))
            file.write(json.dumps({"text": text}) + "\n")
