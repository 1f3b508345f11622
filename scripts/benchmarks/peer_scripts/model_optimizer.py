"""Prunes a checkpoint to 2:4 with NVIDIA Model Optimizer.

    python model_optimizer.py DENSE TOKENS.npy OUT METHOD 2:4

METHOD is sparsegpt or magnitude. Model Optimizer makes 2:4 masks only, and its sparsegpt leaves
the weights that it keeps as they are: training is meant to follow.
"""

import json
import sys
import time
from importlib.metadata import version

import modelopt.torch.sparsity as mts
import numpy as np
import torch
import transformers


def main(dense, tokens, out, method, pattern):
    assert pattern == "2:4"
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    windows = torch.from_numpy(np.load(tokens).astype(np.int64))

    def forward_loop(model):
        for window in windows:
            model(input_ids=window[None])

    start = time.perf_counter()
    if method == "sparsegpt":
        model = mts.sparsify(model, "sparsegpt", config={"forward_loop": forward_loop})
    else:
        model = mts.sparsify(model, "sparse_magnitude")
    model = mts.export(model)
    seconds = time.perf_counter() - start
    model.save_pretrained(out)
    names = ("nvidia-modelopt", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
