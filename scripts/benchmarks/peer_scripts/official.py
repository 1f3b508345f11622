"""Prunes a checkpoint with the code of a paper, as its authors published it, on a CPU.

    python official.py DENSE TOKENS.npy OUT METHOD PATTERN REPOSITORY

METHOD is wanda, sparsegpt, admm or alps; REPOSITORY a clone of the authors' code. Nothing in the
clone is edited. What it needs is changed from outside: arrays meant for cuda:0 stay on the CPU,
torch.cuda.synchronize does nothing, and the calibration windows are those of TOKENS. Runs with
transformers 4.36, whose decoder layers take the arguments that this code passes.
"""

import importlib
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Every array that is meant for a GPU stays on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        args = tuple(_on_cpu(value) for value in args)
        return function(*args, **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


def _on_cpu(value):
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def main(dense, tokens, out, method, pattern, repository):
    sys.path.insert(0, repository)
    torch.cuda.synchronize = lambda *_: None
    model = transformers.LlamaForCausalLM.from_pretrained(dense, torch_dtype=torch.float32)
    model.eval()
    windows = torch.from_numpy(np.load(tokens).astype(np.int64))
    model.seqlen, model.hf_device_map = windows.shape[1], {}
    loader = [(window[None], None) for window in windows]
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    share = 0.5 if group else float(pattern)
    start = time.perf_counter()
    with OnCpu(), torch.no_grad():
        if method in ("wanda", "admm"):
            prune = importlib.import_module("lib.prune")
            prune.get_loaders = lambda *_, **__: (loader, None)
            arguments = Namespace(
                nsamples=len(loader), seed=0, sparsity_ratio=share, use_variant=False
            )
            function = getattr(prune, f"prune_{method}")
            # These scripts say how many of a group are zeros, the others how many are kept.
            zeros = group - kept
            function(arguments, model, None, torch.device("cpu"), prune_n=zeros, prune_m=group)
        else:
            llama = importlib.import_module("llama")
            if method == "sparsegpt":
                llama.args = Namespace(
                    nsamples=len(loader),
                    true_sequential=False,
                    minlayer=-1,
                    maxlayer=1000,
                    prune_only="",
                    invert=False,
                    wbits=16,
                    sparsity=share,
                    prunen=group - kept,
                    prunem=group,
                    percdamp=0.01,
                    blocksize=128,
                )
            else:
                llama.args = Namespace(
                    nsamples=len(loader), method="ALPS", sp=share, nm_n=kept, nm_m=group
                )
            llama.llama_sequential(model, loader, torch.device("cpu"))
    seconds = time.perf_counter() - start
    for weight in model.parameters():
        weight.data = weight.data.contiguous()  # safetensors writes no others
    model.save_pretrained(out)
    commit = subprocess.run(
        ["git", "-C", repository, "log", "-1", "--format=%h of %cs"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    name = Path(repository).resolve().name
    versions = {name: commit, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
