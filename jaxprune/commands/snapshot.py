"""Save the inputs of one layer's solves, its Gram matrices and kernels, for `jaxprune solve`.

They are those of a run with the same flags, before any tuning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.casting import saving_dtype
from convert.destination import destination
from convert.paths import inputs_of, require_apart
from jaxprune.api import snapshot as snapshots
from jaxprune.api.load import load
from jaxprune.commands.command_line import Section, make, require_at_least
from jaxprune.commands.prune import require_suitable, source_paths, windows_of
from jaxprune.commands.run_options import read
from jaxprune.commands.terminal import choose_devices, command, console, keep_memory
from jaxprune.errors import Change, InputError
from jaxprune.sparsity.masks import source_of

EXAMPLES = """Examples:

    jaxprune snapshot layer5.safetensors --layer 5 --ckpt smollm2-135m --nsamples 32 --seqlen 512
    jaxprune snapshot layer5.safetensors --layer 5 --config pruned/jaxprune.json"""
OTHERS = {
    "resume": "a snapshot saves no progress that a later command could resume",
    "save_masks": "a snapshot is saved before the masks of its layer are selected",
    "coordinator": "one process takes a snapshot",
    **dict.fromkeys(
        ("dry_run", "device_memory", "target"), "a snapshot is not planned: use jaxprune plan"
    ),
}
"""Flags of a run that ask for something else -> why a snapshot cannot have them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Which layer."""

    layer: int
    """Index of the layer, from 0."""
    dense_before: bool = False
    """Leave the layers before it dense, instead of pruning them as in the run."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    own, positionals = [Section("Layer", Options)], {"file": "The file to create."}
    given, config, recipe, sparsity = read(argv, __name__, own, positionals)
    wanted = make(Options, given)
    require_at_least(wanted, 0, "layer")
    _require_known(argv, given)
    place = destination(given["file"], overwrite=config.overwrite, folder=False)
    place.check()
    scratch = config.scratch_folder(given["file"])
    if recipe.importance.measured:
        keep_memory(large=True)  # it makes logits
    devices = choose_devices(config.device, config.devices)
    architecture = require_suitable(config, recipe, sparsity)
    snapshots.require_layer(architecture, wanted.layer)
    model = load(config.ckpt, dtype=config.computation_dtype, devices=devices, scratch=scratch)
    if dtype := saving_dtype(model.reader, config.save_dtype):
        model = model.saved_as(dtype)
    inputs = {"ckpt": inputs_of(model.source), "calib": source_paths(config.calib)}
    inputs["mask"] = [given_mask] if (given_mask := source_of(recipe.mask or "")) else []
    require_apart(inputs, {"the file": place.path}, error=InputError)
    windows = windows_of(config, model)
    snapshot = snapshots.capture(
        model, windows, wanted.layer, recipe, prune_before=not wanted.dense_before
    )
    snapshots.save(place.with_inputs(inputs), snapshot)
    console.print(f"{given['file']}: {', '.join(snapshot.kernels)}")


def _require_known(argv: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises InputError for an option that a snapshot cannot have: a flag, or an entry of the file
    of options."""
    for name, reason in OTHERS.items():
        if not given.get(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if any(word.partition("=")[0] == flag for word in argv):
            raise InputError(reason, options={name: Change.OMIT})
        raise InputError(f"{reason}: remove this entry", file=given["config"], entry=name)
