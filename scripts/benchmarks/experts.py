"""A layer of few large experts against one of many small ones, of equal weights: seconds by phase
of a pruning run.

    python scripts/benchmarks experts --experts 8 64 --repeats 3

A random checkpoint of Mixtral's shape, scaled down, is made for each number of experts, with as
many hidden features and as many of them taken by a token. Runs alternate; printed are medians, and
the share of what is neither solve nor forward pass (one is in the Gram matrices' time): their
products, reading, stacking and keeping kernels. The FLOPs are those that `jaxprune plan` counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
from markdown import markdown
from safetensors.numpy import save_file

from convert.names import TEXT
from convert.stored import tensors_of, to_tensor
from jaxprune import load
from jaxprune.costs.shapes import Shapes
from jaxprune.loop import prune_layers
from jaxprune.methods.admm import ADMM
from jaxprune.models import architecture_of
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs
from jaxprune.sparsity.patterns import Unstructured

LAYERS = 3
PHASES = "read", "gram", "solve", "forward"


def checkpoint(folder: Path, experts: int, hidden: int, width: int, per_token: float) -> None:
    """Writes a random checkpoint of Mixtral's architecture."""
    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": width // experts,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_local_experts": experts,
        "num_experts_per_tok": round(per_token * experts),
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    params = {}
    for path, tensor in architecture_of(folder, np.float32).spec.items():
        scale = 1.0 if path.endswith(".scale") else tensor.shape[0] ** -0.5
        noise = generator.normal(size=tensor.shape) * scale
        params[path] = (np.ones(tensor.shape) if path.endswith(".scale") else noise).astype(
            np.float32
        )
    tensors = {
        name: to_tensor(paths, params, TEXT) for name, paths in tensors_of(params, TEXT).items()
    }
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def seconds(folder: Path, tokens: np.ndarray) -> dict[str, float]:
    """The seconds of all layers by phase, and what is left of the whole."""
    start = time.perf_counter()
    found = dict.fromkeys(PHASES, 0.0)
    for layer in prune_layers(load(folder), tokens, ADMM(), Unstructured(0.5)):
        for phase in PHASES:
            found[phase] += layer.figures.seconds[phase]
    return found | {"rest": time.perf_counter() - start - sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument(
        "--width", type=int, default=14336, help="hidden features of all experts together"
    )
    parser.add_argument(
        "--per-token", type=float, default=0.25, help="share of the experts that a token takes"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, 512, (args.tokens // 512, 512)).astype(np.int32)
    with tempfile.TemporaryDirectory() as place:
        folders = {count: Path(place) / str(count) for count in args.experts}
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in args.experts}
        for count, folder in folders.items():
            checkpoint(folder, count, args.hidden, args.width, args.per_token)
            seconds(folder, tokens)  # compiles
        for _ in range(args.repeats):
            for count, folder in folders.items():
                runs[count].append(seconds(folder, tokens))
        rows = []
        for count, folder in folders.items():
            median = {
                phase: statistics.median(run[phase] for run in runs[count])
                for phase in (*PHASES, "rest")
            }
            total = sum(median.values())
            # of all layers: the last is not run again
            within_gram = median["forward"] * LAYERS / (LAYERS - 1)
            outside = total - median["solve"] - median["forward"] - within_gram
            shapes = Shapes(load(folder).architecture, np.float32, ONE_DEVICE)
            flops = {"gram": 0.0, "solve": 0.0, "forward": 0.0}
            for program in layer_costs.programs(shapes, *tokens.shape, ADMM(), Unstructured(0.5)):
                flops[program.phase] += program.calls * sum(program.flops().values())
            rates = [f"{flops[phase] / 1e9 / median[phase]:.0f}" for phase in flops]
            times = [f"{median[phase]:.2f}" for phase in (*PHASES, "rest")]
            rows.append(
                [str(count), *times, f"{total:.2f}", f"{100 * outside / total:.0f} %", *rates]
            )
    header = [
        "experts",
        *(f"{phase}, s" for phase in (*PHASES, "rest")),
        "all, s",
        "outside solves and forward passes",
    ]
    header += [f"{phase}, GFLOP/s" for phase in ("gram", "solve", "forward")]
    print("\n".join(markdown(header, rows)))


if __name__ == "__main__":
    main()
