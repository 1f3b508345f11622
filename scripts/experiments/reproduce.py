"""Runs an experiment of the paper on a checkpoint: a CSV, a Markdown table, and a picture (PNG, SVG).

    python scripts/experiments table1 --ckpt llama-7b --out results
    python scripts/experiments fig1 table3 --ckpt smollm2-135m --small --out results

Experiments: fig1, fig2, table1, table2, table3, table4, table5 of the paper, and ours: over all methods, methods
(perplexity) and layers (error on the same inputs); presets, what each part of them brings, ablation, and what more
text brings, budgets. Every cell is kept in OUT/cells as soon as it is measured, and measured once: the same command
goes on where it stopped, also inside a cell that tunes on a text, and experiments share their cells. --patterns 0.7
measures that sparsity only, --rows best that row, --only-measured nothing: all look at what there is by now of the
rest.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from experiments import EXPERIMENTS, Experiment
from pictures import PARTIAL
from tables import write

from convert import create_checkpoint
from convert.destination import destination, staged
from convert.schema import to_text
from convert.writing import write_text
from jaxprune import InputError, Magnitude, Observer, TextStream, Unstructured, calibration, load, prune_model
from jaxprune.commands import recipe_options
from jaxprune.commands.config import Config
from jaxprune.commands.prune import stream_of, windows_of
from jaxprune.commands.terminal import keep_compilations, keep_memory
from jaxprune.evaluation.quality import Evaluator, Quality
from jaxprune.evaluation.tasks import ZERO_SHOT
from jaxprune.evaluation.text import perplexity, perplexity_of_states
from jaxprune.planning.machine import describe_hardware
from jaxprune.pruning import snapshot as snapshots
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.loop import other_params
from jaxprune.pruning.results import LayerResult
from jaxprune.recipe import Recipe
from jaxprune.reporting import reading, report, schema
from jaxprune.reporting.record import Record, environment
from jaxprune.streaming.model import inside_layer

SMALL = {"nsamples": 16, "seqlen": 512, "eval_seqlen": 512, "eval_windows": 16, "pack": True, "limit": 500}
"""What --small changes: minutes on two cores with a model of 135M weights."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: a recipe on a checkpoint, or (recipe None) the dense checkpoint."""

    row: str
    pattern: str
    step: int | None
    recipe: Recipe | None
    linear: tuple[int, str] | None = None


class Clock(Observer):
    """Adds up the seconds of phases; keeps the divergences on text that is held out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.divergences: list[tuple[int, float]] = []

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        self.divergences.append((tokens, divergence))

    def phase_timed(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Bench:
    """A checkpoint with its texts, on which cells are measured.

    Args:
        args: of the command line.
        experiment: gives the tokens of a window, where the command line does not say, and the layers to look at.
    """

    def __init__(self, args: argparse.Namespace, experiment: Experiment) -> None:
        small = SMALL if args.small else {}

        def setting(name: str, default: Any) -> Any:
            given = getattr(args, name)
            return small.get(name, default) if given is None else given

        self.ckpt, self.out, self.args = args.ckpt, Path(args.out), args
        seqlen = setting("seqlen", experiment.seqlen)
        # The same options as the command line's, for the records of runs.
        self.options = Config(
            ckpt=args.ckpt,
            calib=args.calib,
            nsamples=setting("nsamples", 128),
            seqlen=seqlen,
            pack=args.pack or small.get("pack", False),
            seed=args.seed,
            dtype=args.dtype,
            eval="ppl,zero-shot",
            eval_text=args.eval_text,
            eval_seqlen=setting("eval_seqlen", seqlen),
            eval_windows=setting("eval_windows", None),
            tasks=",".join(ZERO_SHOT),
            limit=setting("limit", None),
            tasks_data=args.tasks_data,
            backend=args.backend,
        )
        self.model = load(args.ckpt, dtype=self.options.computation_dtype)
        self.depth = self.model.num_layers
        self.layers = sorted({int(share * self.depth) for share in experiment.linears})
        self.calibration = windows_of(self.options, self.model)
        self._evaluation_of = functools.cache(
            lambda: calibration.evaluation_windows(
                args.eval_text,
                None if args.eval_text.endswith(".npy") else self.model.tokenizer,
                self.options.eval_seqlen,
                self.options.eval_windows,
            )
        )

    @property
    def evaluation(self) -> np.ndarray:
        return self._evaluation_of()

    def setup(self, measure: str) -> dict[str, Any]:
        """What decides a cell's outcome beside its recipe."""
        texts = {"calibration": self.calibration}
        if measure in ("perplexity", "accuracy"):
            texts["evaluation"] = self.evaluation
        setup = {"checkpoint": self.ckpt, "dtype": str(self.model.dtype), "measure": measure}
        setup |= {name: [*tokens.shape, _digest(tokens)] for name, tokens in texts.items()}
        if measure == "accuracy":
            setup |= {name: getattr(self.options, name) for name in ("tasks", "limit", "backend")}
        return setup

    def measure(self, measure: str, cell: Cell) -> dict[str, Any] | None:
        """A cell's results, from its file or measured now; None where it is not to be measured."""
        identity = self.setup(measure)
        if cell.recipe is None:
            identity["recipe"] = "dense"
        else:
            identity |= cell.recipe.as_json()
        if cell.linear:
            identity["linear"] = list(cell.linear)
        name = "dense" if cell.recipe is None else cell.recipe.slug
        file = self.out / "cells" / f"{measure}-{name}-{_digest(json.dumps(identity, sort_keys=True))}.json"
        if not file.exists():
            args = self.args
            if args.only_measured or (args.patterns and cell.pattern not in ("", *args.patterns)):
                return None
            if args.rows and cell.row not in ("dense", *args.rows):
                return None
            start, self._unfinished = time.perf_counter(), file.with_suffix(".unfinished")
            result = {"resumed": True} if self._unfinished.exists() else {}
            result |= getattr(self, f"_{measure}")(cell)
            result |= {"wall_seconds": time.perf_counter() - start, "hardware": describe_hardware()}
            with staged(destination(file, folder=False)) as made:
                write_text(made, json.dumps({"cell": identity, "result": result}, indent=1) + "\n")
            if self._unfinished.exists():
                shutil.rmtree(self._unfinished)
        return json.loads(file.read_text())["result"]

    def _perplexity(self, cell: Cell) -> dict[str, Any]:
        if cell.recipe is None:
            return {"perplexity": perplexity(self.model, self.evaluation)}
        hidden = self.model.embed(self.evaluation)

        def watch(layer: LayerResult) -> None:
            self.model.forward(layer.index, jax.device_put(inside_layer(layer.index, layer.params)), hidden)

        figures = self._prune(cell.recipe, watch)
        return {"perplexity": perplexity_of_states(self.model, hidden, self.evaluation)} | figures

    def _seconds(self, cell: Cell) -> dict[str, Any]:
        assert cell.recipe is not None
        return self._prune(cell.recipe, lambda layer: None)

    def _accuracy(self, cell: Cell) -> dict[str, Any]:
        """Accuracies and perplexity; and for the report a record as a run or an evaluation leaves it."""
        if cell.recipe is None:
            ((_, quality),) = self._evaluator.measure({self.ckpt: self.model})
            one = {"sparsity": 0.0, "run": None, "quality": quality.as_json()}
            record = {
                "schema": schema.VERSION,
                "kind": "evaluation",
                "config": dataclasses.asdict(self.options),
                "against": self.ckpt,
            }
            record |= {"checkpoints": {self.ckpt: one}, **environment()}
            return {"perplexity": _only_perplexity(quality), "quality": one["quality"], "record": record}
        config = dataclasses.replace(self.options, out=cell.recipe.slug)
        account = Record(dataclasses.asdict(config), cell.recipe, self.calibration, self._stream(cell.recipe))
        reader = self.model.reader
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            with create_checkpoint(Path(folder) / "pruned", reader.spec, reader.assets) as writer:

                def watch(layer: LayerResult) -> None:
                    writer.write(layer.params)
                    account.layer_done(layer)

                figures = self._prune(cell.recipe, watch)
                account.divergences = figures["divergences"]
                for paths in other_params(reader.spec):
                    writer.write(reader.read(paths))
            pruned = self.model.sibling(Path(folder) / "pruned")
            account.evaluation = self._evaluator.measure_texts({"dense": self.model, "pruned": pruned}, "dense")
            self._evaluator.measure_tasks(cell.recipe.slug, pruned, account.evaluation["pruned"])
        quality = account.evaluation["pruned"]
        found = {"perplexity": _only_perplexity(quality), "quality": quality.as_json(), "record": account.as_json()}
        return found | figures

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.options.plan(), self.model)

    def _prune(self, recipe: Recipe, watch: Any) -> dict[str, Any]:
        layers = []
        clock = Clock()
        stream = self._stream(recipe)
        with contextlib.ExitStack() as stack:
            journal = None
            if stream:  # hours
                self._unfinished.mkdir(parents=True, exist_ok=True)
                journal = stack.enter_context(contextlib.closing(Journal(self._unfinished)))
            for layer in prune_model(
                self.model,
                self.calibration,
                recipe,
                stream=stream,
                seed=self.args.seed,
                journal=journal,
                observer=clock,
            ):
                watch(layer)
                layers.append(layer.without_arrays())
        errors = {f"{layer.index}.{path}": kernel.error for layer in layers for path, kernel in layer.kernels.items()}
        # Medians leave out the first layer's compilation and the machine's hiccups.
        for phase in layers[0].seconds:
            clock.phase_timed(phase, statistics.median(layer.seconds[phase] for layer in layers) * len(layers))
        return {
            "error": statistics.mean(errors.values()),
            "errors": errors,
            "seconds": clock.seconds,
            "divergences": clock.divergences,
        }

    def _stream(self, recipe: Recipe) -> TextStream | None:
        return stream_of(self.options, recipe, self.model)

    def _error(self, cell: Cell) -> dict[str, Any]:
        assert cell.recipe is not None and cell.linear is not None
        layer, linear = cell.linear
        ((_, result, _, _),) = snapshots.solve(self._snapshots[layer].only(linear), cell.recipe)
        return {"error": result.error}

    @functools.cached_property
    def _snapshots(self) -> dict[int, snapshots.Snapshot]:
        """The wanted layers' snapshots, behind dense layers."""
        captured = snapshots.capture(
            self.model, self.calibration, self.layers, Magnitude(), Unstructured(0.0), prune_before=False
        )
        return {snapshot.layer: snapshot for snapshot in captured}


def cells(experiment: Experiment, layers: int, *, small: bool = False) -> Iterator[Cell]:
    """All cells of an experiment, the dense checkpoint first where perplexity is measured."""
    if experiment.measure in ("perplexity", "accuracy"):
        yield Cell("dense", "", None, None)
    linears: list[tuple[int, str] | None] = [None]
    if experiment.measure == "error":
        every = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        names = [f"self_attn.{n}" for n in every[0]] + [f"mlp.{n}" for n in every[1]]
        linears = [
            (int(share * layers), name) for share, wanted in experiment.linears.items() for name in wanted or names
        ]
    for pattern in (small and experiment.small_patterns) or experiment.patterns:
        for row, flags in experiment.rows.items():
            if ":" in pattern and ("--uniform" in flags or "--spread" in flags):
                continue  # N:M is uniform anyway
            steps = experiment.small_steps.get(row, experiment.steps) if small else experiment.steps
            for step in steps if "{k}" in flags else (None,):
                schedule = "cubic" if ":" in pattern else "constant"
                recipe = _recipe(flags.format(k=step, schedule=schedule), pattern)
                for linear in linears:
                    yield Cell(row, pattern, step, recipe, linear)


def _only_perplexity(quality: Quality) -> float:
    (text,) = quality.texts.values()
    return text.perplexity


@functools.cache
def _recipe(flags: str, pattern: str) -> Recipe:
    return recipe_options.parse(
        [*flags.split(), *(("--pattern", pattern) if ":" in pattern else ("--sparsity", pattern))]
    )


def _digest(content: np.ndarray | str) -> str:
    data = content.encode() if isinstance(content, str) else np.ascontiguousarray(content, np.int32).tobytes()
    return hashlib.sha256(data).hexdigest()[:12]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, with the defaults that depend on the checkpoint filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--ckpt", required=True, help="the dense checkpoint, as jaxprune --ckpt")
    parser.add_argument("--out", required=True, help="folder for cells, tables and pictures")
    parser.add_argument("--small", action="store_true", help=f"smaller settings: {SMALL}")
    parser.add_argument(
        "--only-measured", action="store_true", help="tables and pictures of the cells there are by now"
    )
    parser.add_argument("--patterns", nargs="+", help="measure these only of the experiment's, such as 0.7 or 2:4")
    parser.add_argument("--rows", nargs="+", help="measure these rows only, such as best")
    parser.add_argument("--calib", help="calibration text (default: c4; wikipedia for smollm2-135m)")
    parser.add_argument("--eval-text", help="evaluation text (default: wikitext2; wikipedia for smollm2-135m)")
    parser.add_argument("--nsamples", type=int, help="calibration windows (default: 128)")
    parser.add_argument("--seqlen", type=int, help="tokens of a calibration window (default: as in the paper)")
    parser.add_argument("--pack", action="store_true", help="join documents to fill calibration windows")
    parser.add_argument("--eval-seqlen", type=int, help="tokens of an evaluation window (default: --seqlen)")
    parser.add_argument("--eval-windows", type=int, help="evaluate on the first so many windows (default: all)")
    parser.add_argument("--limit", type=int, help="rows of each task (default: all)")
    parser.add_argument("--tasks-data", help="folder with the tasks' rows (default: the hub's)")
    parser.add_argument("--backend", choices=["jax", "torch"], default="jax", help="what runs the tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    args = parser.parse_args(argv)
    for name in args.names:
        if other := set(args.patterns or ()) - set(EXPERIMENTS[name].patterns):
            parser.error(f"--patterns {other.pop()}: {name} has {', '.join(EXPERIMENTS[name].patterns)}")
        if other := set(args.rows or ()) - set(EXPERIMENTS[name].rows):
            parser.error(f"--rows {other.pop()!r}: {name} has {', '.join(map(repr, EXPERIMENTS[name].rows))}")
    hubless = args.ckpt == "smollm2-135m"
    args.calib = args.calib or ("wikipedia" if hubless else "c4")
    args.eval_text = args.eval_text or ("wikipedia" if hubless else "wikitext2")
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
        value = f"{result.get('perplexity', result.get('error')):.6g}"
        if "quality" in result:
            value += f", accuracy {result['quality']['mean_accuracy']['acc']:.4f}"
        print(f"{name} {number}/{len(wanted)}: {cell.row}{steps} {cell.pattern}{where}: {value}", flush=True)
    if not results or (len(results) < len(wanted) and experiment.picture not in PARTIAL):
        raise InputError(
            f"{len(results)} of {name}'s {len(wanted)} cells are measured: leave out what leaves the others out"
        )
    for file in write(name, experiment, bench, results):
        print(file)
    if records := [result["record"] for _, result in results if "record" in result]:
        page = bench.out / f"{name}.html"
        write_text(page, report.page([reading.read(to_text(record), page) for record in records]))
        print(page)
