"""Peak host memory of pruning synthetic checkpoints that differ in their number of layers only.

Each run is a process of its own, which reports its peak resident set.

    python scripts/memory.py --layers 10 40
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import sys, resource
import numpy as np
from convert import create_checkpoint, open_checkpoint
from jaxprune import Unstructured, other_params, prune
from jaxprune.methods.admm import ADMM

source, target = sys.argv[1:]
reader = open_checkpoint(source)
tokens = np.random.default_rng(0).integers(0, 1000, (16, 256)).astype(np.int32)
with create_checkpoint(target, reader.spec, reader.assets) as out:
    for layer in prune(reader, tokens, ADMM(iterations=2, selections=1), Unstructured(0.5)):
        out.write(layer.params)
    for paths in other_params(reader.spec):
        out.write(reader.read(paths))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_checkpoint(folder: Path, layers: int, width: int, inner: int) -> int:
    """A random LLaMA in float32; returns its bytes."""
    import jax
    import numpy as np

    from convert import create_checkpoint, parts
    from jaxprune.models import build
    from jaxprune.models._rope import Rope
    from jaxprune.models.llama import Config

    assets = folder.with_name(folder.name + "-assets")
    assets.mkdir()
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    (assets / "config.json").write_text(json.dumps(hf))
    rope = Rope.from_hf({"rope_theta": 10000.0}, width // 8, 2048)
    float32 = jax.numpy.dtype("float32")
    sizes = 1000, width, inner, layers, 8, 8, width // 8, 2048
    model = build("llama", Config(*sizes, 1e-5, "silu", False, False, False, rope, float32))
    generator = np.random.default_rng(0)
    with create_checkpoint(folder, model.spec, assets) as out:
        for paths in parts(model.spec).values():
            out.write({p: generator.normal(0, 0.02, model.spec[p].shape).astype(np.float32) for p in paths})
    return sum(t.size * 4 for t in model.spec.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    args = parser.parse_args()
    print("| layers | checkpoint, MB | peak host memory, MB | against the first |")
    print("|---|---|---|---|")
    first = None
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "dense", Path(folder) / "pruned"
            size = write_checkpoint(source, layers, args.width, args.inner)
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(source), str(target)], capture_output=True, text=True, check=True
            )
        peak = float(done.stdout)
        first = first or peak
        print(f"| {layers} | {size / 2**20:.0f} | {peak:.0f} | {peak / first:.3f} |", flush=True)


if __name__ == "__main__":
    main()
