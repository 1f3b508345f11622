"""Prunes a checkpoint with llm-compressor.

    python llm_compressor.py DENSE TOKENS.npy OUT METHOD PATTERN

METHOD is wanda or sparsegpt. All settings are the library's own but for what the comparison fixes:
the sparsity, the layers that are left out (the head), the windows and their order.
"""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier


def main(dense, tokens, out, method, pattern):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    windows = np.load(tokens).tolist()
    data = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    )
    modifier = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
    recipe = modifier(
        sparsity=0.5 if ":" in pattern else float(pattern),
        mask_structure=pattern if ":" in pattern else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    model.save_pretrained(out, save_compressed=False)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
