"""How methods rank on small models of several families, trained here: perplexities at 50 % and 70
%, two seeds.

    JAXPRUNE_DATA=... python scripts/trained.py --out DIR [--steps 500] [--seeds 0 1]

A model of some million weights of each family is trained by transformers on C4's text, with a
vocabulary of its own, and pruned by Wanda, SparseGPT and ADMM on other text of C4; the perplexity
is that of text that neither saw. With experts, what dropping a quarter of them does is measured,
too, and ADMM with all tokens for all experts. Prints a table; a difference below the spread of the
seeds is a tie.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxprune import load, prune
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.methods.admm import ADMM
from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.methods.wanda import Wanda
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Rule, Structure
from jaxprune.sparsity.patterns import Unstructured

LENGTH, VOCABULARY = 256, 2048
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "qwen3_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    },  # else few experts are given all tokens
}
METHODS = {"wanda": Wanda(), "sparsegpt": SparseGPT(), "admm": ADMM()}
SPARSITIES = (0.5, 0.7)


def ids() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids to train on, to prune with, and to evaluate on, in windows."""
    from tokenizers import ByteLevelBPETokenizer

    file = Path(os.environ["JAXPRUNE_DATA"]) / "c4/c4-train-sample.jsonl"
    documents = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents[:1800], VOCABULARY, show_progress=False, special_tokens=["<end>"]
    )
    parts = []
    for some in (documents[:1750], documents[1750:1850], documents[1850:]):
        joined = [token for text in some for token in (*tokenizer.encode(text).ids, 0)]
        parts.append(
            np.array(joined[: len(joined) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
        )
    return parts[0], parts[1], parts[2]


def train(family: str, seed: int, windows: np.ndarray, steps: int, folder: Path) -> None:
    """Trains a model by AdamW on windows in a random order, eight a step."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    order = np.random.default_rng(seed).permutation(len(windows) * 9)[: steps * 8].reshape(
        -1, 8
    ) % len(windows)
    begun = time.perf_counter()
    for step, rows in enumerate(order):
        rate = min(1, (step + 1) / 40) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        batch = torch.tensor(windows[rows].astype(np.int64))
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - begun
            print(
                f"# {family} {seed} step {step + 1} loss {loss.item():.3f} {spent:.0f} s",
                flush=True,
            )
    model.save_pretrained(folder)


def measured(
    folder: Path, out: Path, calibration: np.ndarray, text: np.ndarray
) -> dict[str, float]:
    """The perplexities of a dense model and of what is made of it."""
    found = {"dense": perplexity(load(folder), text)}
    recipes = {
        f"{name}, {sparsity:.0%}": Recipe(method, Unstructured(sparsity, method.per_output))
        for sparsity in SPARSITIES
        for name, method in METHODS.items()
    }
    if load(folder).architecture.config.routing:
        all_dense = Recipe(
            METHODS["wanda"], rules=(Rule("*"),), structure=Structure(drop_experts=0.25)
        )
        recipes["a quarter of the experts dropped"] = all_dense
        for sparsity in SPARSITIES:
            every = Recipe(METHODS["admm"], Unstructured(sparsity), route_all=True)
            recipes[f"admm, {sparsity:.0%}, all tokens to all experts"] = every
    for name, recipe in recipes.items():
        pruned = out / name.replace(" ", "-").replace(",", "").replace("%", "")
        prune(load(folder), calibration, recipe, pruned)
        found[name] = perplexity(load(pruned), text)
        print(f"# {folder.name} {name} {found[name]:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder for the models; trained ones there are used",
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args()
    training, calibration, text = ids()
    print(
        f"# {training.size} tokens to train on, {calibration.size} to prune with, {text.size} to "
        "evaluate on",
        flush=True,
    )
    print("| family | what | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " |")
    print("|---|---|" + "---:|" * len(args.seeds))
    for family in args.families:
        rows: dict[str, list[float]] = {}
        for seed in args.seeds:
            folder = args.out / f"{family}-{seed}"
            if not (folder / "model.safetensors").exists():
                train(family, seed, training, args.steps, folder)
            every = measured(folder, args.out / f"{family}-{seed}-pruned", calibration, text)
            for name, value in every.items():
                rows.setdefault(name, []).append(value)
        for name, values in rows.items():
            print(
                f"| {family} | {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
