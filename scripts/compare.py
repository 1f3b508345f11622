"""Perplexity of several methods and patterns on the same calibration windows, as one Markdown table.

Nothing is exported: the evaluation text moves through each layer as soon as it is pruned.

    python scripts/compare.py --ckpt smollm2-135m --calib wikipedia --eval-text wikipedia
"""

import argparse
import sys
import time

import jax
import numpy as np

from convert import CheckpointError, open_checkpoint
from convert.assets import load_tokenizer
from jaxprune import InputError, calibration, prune
from jaxprune.evaluation.perplexity import mean_loss_perplexity, perplexity
from jaxprune.methods import Method
from jaxprune.methods._combine import Crossed
from jaxprune.methods.admm import ADMM
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.wanda import Wanda
from jaxprune.models import model_for
from jaxprune.patterns import parse
from jaxprune.stream import embed, forward

METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "admm1 (wanda mask)": Crossed(Wanda(), ADMM()),
    "admm-grad, constant": ADMM(schedule="constant"),
    "admm-grad, cubic": ADMM(schedule="cubic"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--calib", default="wikipedia")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-text", default="wikipedia")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"], help="sparsities or N:M")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reader = open_checkpoint(args.ckpt)
    tokenizer = load_tokenizer(reader.assets)
    tokens = calibration.sample(args.calib, tokenizer, args.nsamples, args.seqlen, args.seed, pack=True)
    evaluation = calibration.evaluation_windows(args.eval_text, tokenizer, args.eval_seqlen, args.eval_windows)
    print(f"{args.ckpt}; calibration {list(tokens.shape)} packed, evaluation {list(evaluation.shape)}, {_hardware()}\n")
    print("| method | " + " | ".join(args.patterns) + " | seconds |")
    print("|---" * (len(args.patterns) + 2) + "|")
    print(f"| dense | {perplexity(reader, evaluation):.2f} |" + " |" * len(args.patterns), flush=True)
    for name in args.methods:
        start, cells = time.perf_counter(), []
        for pattern in args.patterns:
            cells.append(f"{_pruned_perplexity(reader, tokens, evaluation, METHODS[name], pattern):.2f}")
            print(f"{name}, {pattern}: {cells[-1]}", file=sys.stderr, flush=True)
        print(f"| {name} | " + " | ".join(cells) + f" | {time.perf_counter() - start:.0f} |", flush=True)


def _pruned_perplexity(reader, tokens: np.ndarray, evaluation: np.ndarray, method: Method, text: str) -> float:
    scope = "per-output" if method.per_output else "unstructured"
    pattern = parse(text) if ":" in text else parse(scope, float(text))
    model = model_for(reader)
    hidden = embed(model, reader, evaluation)
    for layer in prune(reader, tokens, method, pattern):
        prefix = f"layers.{layer.index}."
        forward(model, {p.removeprefix(prefix): jax.device_put(a) for p, a in layer.params.items()}, hidden)
    return mean_loss_perplexity(model, reader, hidden, evaluation)


def _hardware() -> str:
    return f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"


if __name__ == "__main__":
    try:
        main()
    except (InputError, CheckpointError) as error:
        sys.exit(f"error: {error}")
