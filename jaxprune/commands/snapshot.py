"""Save what pruning one layer starts from, its Gram matrices and kernels, for `jaxprune solve`."""

import dataclasses
import sys
from collections.abc import Sequence

from convert.destination import destination
from convert.paths import inputs_of, require_apart
from jaxprune.api.load import load
from jaxprune.commands.config import read
from jaxprune.commands.options import Section, make, require_at_least
from jaxprune.commands.prune import source_paths, windows_of
from jaxprune.commands.terminal import choose_devices, console, run_main
from jaxprune.errors import InputError
from jaxprune.pruning import snapshot as snapshots

DESCRIPTION = "Save what pruning one layer starts from, as the run with these flags meets it: see jaxprune solve."
EXAMPLES = """Examples:

    jaxprune snapshot layer5.safetensors --layer 5 --ckpt smollm2-135m --nsamples 32 --seqlen 512"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Which layer."""

    layer: int
    """The layer, from 0."""
    dense_before: bool = False
    """Leave the layers before it dense, instead of pruning them as the run would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    own, positionals = [Section("Layer", Options)], {"file": "The file to make."}
    given, config, recipe = read(argv, "jaxprune snapshot", DESCRIPTION, EXAMPLES, own, positionals)
    wanted = make(Options, given)
    require_at_least(wanted, 0, "layer")
    place = destination(given["file"], overwrite=config.overwrite, folder=False)
    place.check()
    devices = choose_devices(config.device, config.devices, config.join)
    model = load(config.ckpt, dtype=config.computation_dtype, devices=devices)
    inputs = {"ckpt": inputs_of(model.source), "calib": source_paths(config.calib)}
    require_apart(inputs, {"the file": place.path}, error=InputError)
    place.inputs = tuple(path for paths in inputs.values() for path in paths)
    (snapshot,) = snapshots.capture(
        model,
        windows_of(config, model),
        [wanted.layer],
        recipe.method,
        recipe.target(),
        prune_before=not wanted.dense_before,
    )
    snapshots.save(place, snapshot)
    console.print(f"{given['file']}: {', '.join(snapshot.kernels)}")


if __name__ == "__main__":
    sys.exit(main())
