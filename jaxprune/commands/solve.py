"""Prune one layer from a file of its Gram matrices and kernels, without the model.

`jaxprune snapshot` makes the file. Without --pattern, --sparsity and given masks, each linear
layer gets the pattern that it has in the snapshot's run.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.destination import destination
from convert.files import expand
from convert.paths import require_apart
from jaxprune.api import snapshot as snapshots
from jaxprune.commands.command_line import CommandLine, Section, make
from jaxprune.commands.recipe_options import RecipeOptions
from jaxprune.commands.terminal import command
from jaxprune.errors import InputError
from jaxprune.recipe import Recipe
from jaxprune.sparsity import masks

EXAMPLES = """Examples:

    jaxprune solve layer5.safetensors --mask wanda --update exact"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to solve."""

    linear: str | None = None
    """Solve only this linear layer, such as mlp.down_proj (default: all in the file)."""
    out: str | None = None
    """Write the pruned layer to this file, in the same format with pruned kernels."""
    overwrite: bool = False
    """Replace --out if it is an earlier result that has not been changed since."""


def parse(argv: Sequence[str]) -> tuple[Path, Options, Recipe, bool]:
    """Reads a command line.

    Returns:
        The file, what to solve of it, how, and whether a pattern, a sparsity or masks are given.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    line = CommandLine(argv, __name__)
    chosen = RecipeOptions(line, whole_model=False)
    given = line.read(
        Section("Layer and result", Options),
        *chosen.sections(),
        positionals={"file": "The layer's file."},
        elsewhere=chosen.elsewhere,
    )
    recipe = chosen.recipe(given)
    is_given = recipe.mask is not None or not given.keys().isdisjoint(("pattern", "sparsity"))
    return Path(given["file"]), make(Options, given), recipe, is_given


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    file, asked, recipe, is_given = parse(argv)
    file = expand(file)
    place = (
        destination(asked.out, "out", overwrite=asked.overwrite, folder=False)
        if asked.out
        else None
    )
    if place:
        given = masks.source_of(recipe.mask or "")
        inputs = {"the file": [file]} | ({"mask": [given]} if given else {})
        require_apart(inputs, {"out": place.path}, error=InputError)
        place.check()
    snapshot = snapshots.load(file)
    if asked.linear:
        snapshot = snapshot.only(asked.linear)
    kernels = dict(snapshot.kernels)
    patterns = {} if is_given else snapshot.patterns
    target = (lambda index, path: patterns[path]) if patterns else recipe.target()
    print(
        f"layer {snapshot.layer}, {recipe.method_text}, "
        f"{'patterns of its run' if patterns else recipe.pattern_text}"
    )
    columns = "{:<20} {:>14} {:>14} {:>10} {:>8}  {}"
    print(
        columns.format("linear layer", "n × m", "relative error", "sparsity", "seconds", "metrics")
    )
    for path, result, seconds, kernel in snapshots.solve(snapshot, recipe.method, target):
        kernels[path] = np.asarray(kernel)
        shape = " × ".join(map(str, kernel.shape))
        sparsity = f"{100 * result.zeros / result.size:.2f} %"
        metrics = ", ".join(f"{name} {value:.3g}" for name, value in result.stats.items())
        print(
            columns.format(path, shape, f"{result.error:.6f}", sparsity, f"{seconds:.2f}", metrics),
            flush=True,
        )
    if place:
        snapshots.save(place, snapshot._replace(kernels=kernels))
