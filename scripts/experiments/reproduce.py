"""Runs an experiment of the paper on a checkpoint: a CSV, a Markdown table, and a picture (PNG,
SVG).

    python scripts/experiments table1 --ckpt llama-7b --out results
    python scripts/experiments fig1 table3 --ckpt smollm2-135m --small --out results

Experiments: fig1, fig2, table1, table2, table3, table4, table5 of the paper, and ours: over all
methods, methods (perplexity) and layers (error on the same inputs); presets; comparison, all
methods with and without what the presets add (with comparison_tasks and comparison_time); what each
part of the presets brings, ablation, and what more text brings, budgets.

Each cell is saved in OUT/cells when it is measured, and measured once: the same command resumes
where it stopped, also inside a cell that tunes on a text, and experiments share their cells. Cells
of other results (see .ci/unchanged-since) or another JAX are not used. --patterns 0.7 measures that
sparsity only, --rows best that row, and --only-measured nothing; tables show all measured cells.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from bench import SMALL, Bench, Cell
from experiments import EXPERIMENTS, Experiment
from pictures import PARTIAL
from tables import write

from convert.schema import to_text
from convert.writing import write_text
from jaxprune import InputError, calibration
from jaxprune.commands import recipe_options
from jaxprune.commands.terminal import keep_compilations, keep_memory
from jaxprune.recipe import Recipe
from jaxprune.reporting import record as records
from jaxprune.reporting import report

UNSTRUCTURED_SETTINGS = {
    "schedule": "constant",
    "allocation": "--pattern unstructured --max-deviation 0.3",
    "gradual": "--tune-gradual 0.25",
}
N_M_SETTINGS = {"schedule": "cubic", "allocation": "", "gradual": ""}
"""What rows' flags have in braces."""


def cells(experiment: Experiment, layers: int, *, small: bool = False) -> Iterator[Cell]:
    """All cells of an experiment, the dense checkpoint first where perplexity is measured."""
    if experiment.measure in ("perplexity", "quality", "accuracy"):
        yield Cell("dense", "", None, None)
    most = max([1, *(count for row in experiment.seeds.values() for count in row.values())])
    for seed in range(most):
        for cell in _of_one_seed(experiment, layers, small=small):
            if seed < experiment.seeds.get(cell.row, {cell.pattern: 1}).get(cell.pattern, 0):
                yield dataclasses.replace(cell, seed=seed)


def _of_one_seed(experiment: Experiment, layers: int, *, small: bool) -> Iterator[Cell]:
    linears: list[tuple[int, str] | None] = [None]
    if experiment.measure == "error":
        names = [f"self_attn.{n}_proj" for n in "qkvo"] + [
            f"mlp.{n}_proj" for n in ("gate", "up", "down")
        ]
        linears = [
            (int(share * layers), name)
            for share, wanted in experiment.linears.items()
            for name in wanted or names
        ]
    for pattern in (small and experiment.small_patterns) or experiment.patterns:
        for row, flags in experiment.rows.items():
            if ":" in pattern and ("--uniform" in flags or "--max-deviation" in flags):
                continue  # N:M is uniform anyway
            steps = experiment.small_steps.get(row, experiment.steps) if small else experiment.steps
            for step in steps if "{k}" in flags else (None,):
                settings = N_M_SETTINGS if ":" in pattern else UNSTRUCTURED_SETTINGS
                recipe = _recipe(flags.format(k=step, **settings), pattern)
                for linear in linears:
                    yield Cell(row, pattern, step, recipe, linear)


@functools.cache
def _recipe(flags: str, pattern: str) -> Recipe:
    return recipe_options.parse(
        [*flags.split(), *(("--pattern", pattern) if ":" in pattern else ("--sparsity", pattern))]
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, with the defaults that depend on the checkpoint filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS)
    )
    parser.add_argument("--ckpt", required=True, help="the dense checkpoint, as jaxprune --ckpt")
    parser.add_argument("--out", required=True, help="folder for cells, tables and pictures")
    parser.add_argument("--small", action="store_true", help=f"smaller settings: {SMALL}")
    parser.add_argument(
        "--only-measured",
        action="store_true",
        help="tables and pictures of the cells there are by now",
    )
    parser.add_argument(
        "--patterns", nargs="+", help="measure these only of the experiment's, such as 0.7 or 2:4"
    )
    parser.add_argument("--rows", nargs="+", help="measure these rows only, such as best")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep checkpoints that tasks are run on, OUT/checkpoints",
    )
    parser.add_argument(
        "--calib", help="calibration text (default: c4; wikipedia for smollm2-135m)"
    )
    parser.add_argument(
        "--eval-text", help="evaluation text (default: wikitext2; wikipedia for smollm2-135m)"
    )
    parser.add_argument("--nsamples", type=int, help="calibration windows (default: 128)")
    parser.add_argument(
        "--seqlen", type=int, help="tokens of a calibration window (default: as in the paper)"
    )
    parser.add_argument(
        "--pack", action="store_true", help="join documents to fill calibration windows"
    )
    parser.add_argument(
        "--eval-seqlen", type=int, help="tokens of an evaluation window (default: --seqlen)"
    )
    parser.add_argument(
        "--eval-windows", type=int, help="evaluate on the first so many windows (default: all)"
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        help="do not calibrate on so many last documents of --calib, but evaluate on them too",
    )
    parser.add_argument("--limit", type=int, help="rows of each task (default: all)")
    parser.add_argument("--tasks-data", help="folder with the tasks' rows (default: the hub's)")
    parser.add_argument(
        "--backend", choices=["jax", "torch"], default="jax", help="what runs the tasks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    args = parser.parse_args(argv)
    for name in args.names:
        if other := set(args.patterns or ()) - set(EXPERIMENTS[name].patterns):
            parser.error(
                f"--patterns {other.pop()}: {name} has {', '.join(EXPERIMENTS[name].patterns)}"
            )
        if other := set(args.rows or ()) - set(EXPERIMENTS[name].rows):
            parser.error(
                f"--rows {other.pop()!r}: {name} has {', '.join(map(repr, EXPERIMENTS[name].rows))}"
            )
    default_text = calibration.default_text(args.ckpt)
    args.calib = args.calib or default_text or "c4"
    args.eval_text = args.eval_text or default_text or "wikitext2"
    return args


def main() -> None:
    args = parse()
    keep_compilations()  # else the first cell would bear what all the others find in memory
    keep_memory(large=True)
    for name in args.names:
        run(name, EXPERIMENTS[name], Bench(args, EXPERIMENTS[name]))


def run(name: str, experiment: Experiment, bench: Bench) -> None:
    """Measures what is missing of an experiment, and writes its files."""
    wanted = list(cells(experiment, bench.depth, small=bench.args.small))
    results = []
    for number, cell in enumerate(wanted, 1):
        result = bench.measure(experiment.measure, cell)
        if result is None:
            continue
        results.append((cell, result))
        where = "" if cell.linear is None else f", {'.'.join(map(str, cell.linear))}"
        steps = "" if cell.step is None else f", {cell.step} steps"
        seed = f", seed {cell.seed}" * (cell.seed > 0)
        value = f"{result.get('perplexity', result.get('error')):.6g}"
        if "quality" in result:
            value += f", accuracy {result['quality']['mean_accuracy']['acc']:.4f}"
        what = f"{cell.row}{steps} {cell.pattern}{where}{seed}"
        print(f"{name} {number}/{len(wanted)}: {what}: {value}", flush=True)
    if not results or (len(results) < len(wanted) and experiment.picture not in PARTIAL):
        raise InputError(
            f"{len(results)} of {name}'s {len(wanted)} cells are measured: leave out what leaves "
            "the others out"
        )
    for file in write(name, experiment, bench, results):
        print(file)
    if found := [result["record"] for _, result in results if "record" in result]:
        page = bench.out / f"{name}.html"
        write_text(page, report.page([records.read(to_text(record), page) for record in found]))
        print(page)
