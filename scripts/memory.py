"""Peak host memory of pruning synthetic checkpoints that differ in their number of layers only.

Each run is a process of its own, which reports its peak resident set.

    python scripts/memory.py --layers 10 40
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from sizes import Size, write_checkpoint

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
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    args = parser.parse_args()
    print("| layers | checkpoint, MB | peak host memory, MB | against the first |")
    print("|---|---|---|---|")
    first = None
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "dense", Path(folder) / "pruned"
            size = write_checkpoint(source, Size(args.width, args.inner, layers, 8, 8, 1000, 2048))
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(source), str(target)], capture_output=True, text=True, check=True
            )
        peak = float(done.stdout)
        first = first or peak
        print(f"| {layers} | {size / 2**20:.0f} | {peak:.0f} | {peak / first:.3f} |", flush=True)


if __name__ == "__main__":
    main()
