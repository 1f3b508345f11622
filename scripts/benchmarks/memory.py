"""Peak host memory of pruning synthetic checkpoints that differ in their number of layers only.

Each run is a process of its own, which reports its peak resident set.

    python scripts/benchmarks memory --layers 10 40
    python scripts/benchmarks memory --size wide --layers 40 --curve
    python scripts/benchmarks memory --size llama2-70b --layers 1 --stored bfloat16
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from sizes import SIZES, Size, write_checkpoint

RUN = """
import json, resource, sys
from pathlib import Path
import numpy as np
from convert import create_checkpoint
from jaxprune import ADMM, Unstructured, load, prune_layers
from jaxprune.commands.terminal import keep_memory
from jaxprune.loop import other_params

keep_memory()
source, target = sys.argv[1:]
model = load(source)
reader = model.reader
tokens = np.random.default_rng(0).integers(0, 1000, (16, 256)).astype(np.int32)
with create_checkpoint(target, reader.spec, reader.assets) as out:
    for layer in prune_layers(model, tokens, ADMM(iterations=2, selections=1), Unstructured(0.5)):
        out.write(layer.params)
        lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":") for line in lines)
        sizes = [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]
    print(json.dumps(sizes), flush=True)
    for paths in other_params(reader.spec):
        out.write(reader.read(paths))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    sizes = {"narrow": Size(1024, 2816, 0, 8, 8), "wide": Size(2048, 5632, 0, 16, 16), **SIZES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 40])
    parser.add_argument(
        "--size", choices=sizes, default="narrow", help="narrow is of width 1024, wide of 2048"
    )
    parser.add_argument("--stored", default="float32", help="of the params")
    parser.add_argument("--curve", action="store_true", help="print the memory after each layer")
    args = parser.parse_args()
    print("| layers | checkpoint, MiB | peak host memory, MiB | against the first |")
    print("|---|---|---|---|")
    first, size = None, sizes[args.size]
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "dense", Path(folder) / "pruned"
            written = write_checkpoint(
                source, size._replace(layers=layers, vocabulary=1000), args.stored
            )
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(source), str(target)],
                capture_output=True,
                text=True,
                check=True,
            )
        *curve, last = done.stdout.splitlines()
        peak = float(last)
        first = first or peak
        print(f"| {layers} | {written / 2**20:.0f} | {peak:.0f} | {peak / first:.3f} |", flush=True)
        if args.curve:
            print("\n| after layer | resident, MiB | peak, MiB |\n|---|---|---|")
            for layer, (resident, most) in enumerate(map(json.loads, curve), 1):
                print(f"| {layer} | {resident:.0f} | {most:.0f} |")
