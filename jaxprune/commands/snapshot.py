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
from jaxprune.errors import Change, InputError
from jaxprune.pruning import snapshot as snapshots
from jaxprune.pruning.rules import with_rules
from jaxprune.pruning.whole_model import require_recipe
from jaxprune.sparsity.masks import source_of

DESCRIPTION = "Save what pruning one layer starts from, as the run with these flags meets it: see jaxprune solve."
EXAMPLES = """Examples:

    jaxprune snapshot layer5.safetensors --layer 5 --ckpt smollm2-135m --nsamples 32 --seqlen 512"""
OTHERS = (
    *("preset", "asymmetry", "token_power", "weigh_outputs", "spread", "drop_experts", "route_all"),
    *("resume", "save_masks", "coordinator", "dry_run", "device_memory", "target"),
)
"""Flags of a run that a snapshot is not taken of, or that ask for something else."""


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
    if refused := [name for name in OTHERS if given.get(name)]:
        raise InputError("a snapshot cannot be taken with it", options=dict.fromkeys(refused[:1], Change.OMIT))
    place = destination(given["file"], overwrite=config.overwrite, folder=False)
    place.check()
    scratch = config.scratch_folder(given["file"])
    devices = choose_devices(config.device, config.devices)
    model = load(config.ckpt, dtype=config.computation_dtype, devices=devices, scratch=scratch)
    inputs = {"ckpt": inputs_of(model.source), "calib": source_paths(config.calib)}
    inputs["mask"] = [given_mask] if (given_mask := source_of(recipe.mask or "")) else []
    require_apart(inputs, {"the file": place.path}, error=InputError)
    place.inputs = tuple(path for paths in inputs.values() for path in paths)
    target, named = require_recipe(model.architecture, recipe)
    (snapshot,) = snapshots.capture(
        model,
        windows_of(config, model),
        [wanted.layer],
        recipe.method,
        with_rules(target, named),
        prune_before=not wanted.dense_before,
    )
    snapshots.save(place, snapshot)
    console.print(f"{given['file']}: {', '.join(snapshot.kernels)}")


if __name__ == "__main__":
    sys.exit(main())
