"""Prune one layer from a file of its Gram matrices and kernels, without the model."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.files import expand
from convert.ownership import destination
from convert.paths import require_apart
from jaxprune.commands.flags import add_fields, make
from jaxprune.commands.terminal import run_main
from jaxprune.errors import Change, InputError
from jaxprune.pruning import snapshot as problems
from jaxprune.pruning.kernel import LinearResult, solve_linear
from jaxprune.pruning.pipeline import require_fit
from jaxprune.pruning.snapshot import Problem
from jaxprune.recipe import Parser, Recipe
from jaxprune.sparsity import masks


@dataclasses.dataclass(frozen=True)
class Options:
    """What to solve."""

    linear: str | None = None
    """Only this linear, such as mlp.down_proj (default: all of the layer)."""
    out: str | None = None
    """A file for the pruned layer, in the same format: its kernels are the pruned ones."""
    overwrite: bool = False
    """Replace --out if it is an earlier result that nobody changed."""


def solve(problem: Problem, recipe: Recipe) -> Iterator[tuple[str, LinearResult, float, jax.Array]]:
    """Prunes the problem's linears: each one's path, outcome, seconds and pruned kernel.

    The time of preparation (once per input) is counted to the first linear that reads the input.

    Raises:
        InputError: the recipe's pattern or mask does not fit the problem, or a linear cannot be solved.
    """
    given = recipe.patterns()
    patterns = {p: given(problem.layer, p) if callable(given) else given for p in problem.kernels}
    for path, pattern in patterns.items():
        require_fit(pattern, problem.layer, path, problem.kernels[path].shape)
    for tap, linears in problem.inputs.items():
        start = time.perf_counter()
        gram = jnp.asarray(problem.grams[tap])
        prepared = recipe.method.prepare(gram)
        for linear in linears:
            kernel = jnp.asarray(problem.kernels[linear])
            stored, _, result = solve_linear(recipe.method, prepared, gram, kernel, patterns[linear])
            if not math.isfinite(result.error):
                raise InputError(
                    f"{linear} cannot be solved, its weights come out as NaN or infinity",
                    options={"damping": Change.RAISE},
                )
            yield linear, result, time.perf_counter() - start, stored
            start = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_run, argv)


def parse(argv: Sequence[str]) -> tuple[Path, Options, Recipe]:
    """Reads a command line: the file, what to solve of it, and how.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    reader = Parser(
        argv,
        whole_model=False,
        prog="jaxprune solve",
        description="Prune one layer from a file of its Gram matrices and kernels, which scripts/save_layer.py makes.",
    )
    reader.parser.add_argument("file", help="the layer's file", type=Path)
    add_fields(reader.parser.add_argument_group("problem"), Options)
    given, recipe = reader.parse()
    return given["file"], make(Options, given), recipe


def _run(argv: Sequence[str]) -> None:
    file, options, recipe = parse(argv)
    file = expand(file)
    place = destination(options.out, "out", overwrite=options.overwrite, folder=False) if options.out else None
    if place:
        given = masks.source_of(recipe.mask or "")
        inputs = {"the file": [file]} | ({"mask": [given]} if given else {})
        require_apart(inputs, {"out": place.path}, error=InputError)
        place.check()
    problem = problems.load(file)
    if options.linear:
        problem = only(problem, options.linear)
    kernels = dict(problem.kernels)
    print(f"layer {problem.layer}, {recipe.name}, {recipe.target}")
    columns = "{:<20} {:>14} {:>14} {:>10} {:>8}  {}"
    print(columns.format("linear", "n × m", "relative error", "sparsity", "seconds", "figures"))
    for linear, result, seconds, kernel in solve(problem, recipe):
        kernels[linear] = np.asarray(kernel)
        shape = " × ".join(map(str, kernel.shape))
        sparsity = f"{100 * result.zeros / result.size:.2f} %"
        figures = ", ".join(f"{name} {value:.3g}" for name, value in result.stats.items())
        print(columns.format(linear, shape, f"{result.error:.6f}", sparsity, f"{seconds:.2f}", figures), flush=True)
    if place:
        problems.save(place, problem._replace(kernels=kernels))


def only(problem: Problem, linear: str) -> Problem:
    """The problem of one linear.

    Raises:
        InputError: there is no such linear.
    """
    if linear not in problem.kernels:
        raise InputError(f"there is no linear {linear!r}: the file has {', '.join(problem.kernels)}")
    (tap,) = (tap for tap, linears in problem.inputs.items() if linear in linears)
    return Problem(problem.layer, {tap: (linear,)}, {tap: problem.grams[tap]}, {linear: problem.kernels[linear]})


if __name__ == "__main__":
    sys.exit(main())
