"""Peak host memory of pruning synthetic checkpoints that differ in their number of layers only.

Each run is a process of its own, which reports its peak resident set.

    python scripts/memory.py --layers 10 40
    python scripts/memory.py --size llama2-70b --layers 1 --stored bfloat16
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from sizes import SIZES, Size, write_checkpoint

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--size", choices=SIZES, help="a model by size (default: width 1024, inner 2816)")
    parser.add_argument("--stored", default="float32", help="of the params")
    args = parser.parse_args()
    print("| layers | checkpoint, MB | peak host memory, MB | against the first |")
    print("|---|---|---|---|")
    first, size = None, SIZES[args.size] if args.size else Size(1024, 2816, 0, 8, 8)
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "dense", Path(folder) / "pruned"
            written = write_checkpoint(source, size._replace(layers=layers, vocabulary=1000), args.stored)
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(source), str(target)], capture_output=True, text=True, check=True
            )
        peak = float(done.stdout)
        first = first or peak
        print(f"| {layers} | {written / 2**20:.0f} | {peak:.0f} | {peak / first:.3f} |", flush=True)


if __name__ == "__main__":
    main()
