"""Saves what pruning one layer starts from, its Gram matrices and kernels, for `jaxprune solve`.

    python scripts/save_layer.py --layer 5 --file layer5.safetensors --ckpt smollm2-135m --nsamples 32 --seqlen 512

All flags of a run are taken. The layers before are pruned as the run would prune them, so that the file is the problem
that the run meets; --dense-before leaves them dense.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from convert.command import ArgumentParser
from convert.destination import destination
from jaxprune import InputError, load
from jaxprune.commands.config import parse
from jaxprune.commands.options import whole
from jaxprune.commands.prune import calibration_windows
from jaxprune.commands.terminal import run_main
from jaxprune.pruning import snapshot as snapshots


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=whole, required=True, help="from 0")
    parser.add_argument("--file", type=Path, required=True, help="the file to make")
    parser.add_argument("--dense-before", action="store_true", help="leave the layers before dense")
    args, rest = parser.parse_known_args(argv)
    if args.layer < 0:
        raise InputError(f"--layer counts from 0, so it cannot be {args.layer}")
    config, recipe = parse(rest)
    place = destination(args.file, "file", overwrite=config.overwrite, folder=False)
    place.check()
    model = load(config.ckpt, dtype=config.computation_dtype)
    (snapshot,) = snapshots.capture(
        model,
        calibration_windows(config, model),
        [args.layer],
        recipe.method,
        recipe.target(),
        prune_before=not args.dense_before,
    )
    snapshots.save(place, snapshot)
    print(f"{args.file}: {', '.join(snapshot.kernels)}")


if __name__ == "__main__":
    sys.exit(run_main(main, None))
