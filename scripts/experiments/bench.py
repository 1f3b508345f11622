"""A checkpoint with its texts, on which the cells of experiments are measured."""

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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from experiments import Experiment

from convert import create_checkpoint
from convert.destination import destination, staged
from convert.writing import write_text
from jaxprune import Magnitude, Observer, TextStream, Unstructured, calibration, load, prune_model
from jaxprune.commands.config import Config
from jaxprune.commands.prune import stream_of, windows_of
from jaxprune.evaluation.quality import Evaluator, Quality
from jaxprune.evaluation.tasks import ZERO_SHOT
from jaxprune.evaluation.text import perplexity, perplexity_of_states
from jaxprune.planning.machine import describe_hardware
from jaxprune.pruning import snapshot as snapshots
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.loop import other_params
from jaxprune.pruning.results import LayerResult
from jaxprune.recipe import Recipe
from jaxprune.reporting import schema
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

    @functools.cached_property
    def evaluation(self) -> np.ndarray:
        text, options = self.args.eval_text, self.options
        tokenizer = None if text.endswith(".npy") else self.model.tokenizer
        return calibration.evaluation_windows(text, tokenizer, options.eval_seqlen, options.eval_windows)

    def setup(self, measure: str) -> dict[str, Any]:
        """What decides a cell's outcome beside its recipe."""
        texts = {"calibration": self.calibration}
        if measure in ("perplexity", "accuracy"):
            texts["evaluation"] = self.evaluation
        setup = {"checkpoint": self.ckpt, "dtype": str(self.model.dtype), "measure": measure, "seed": self.args.seed}
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
            if stream := self._stream(cell.recipe):
                identity["tuning_text"] = stream.as_json()
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
            start, unfinished = time.perf_counter(), _unfinished(file)
            result = {"resumed": True} if unfinished.exists() else {}
            result |= getattr(self, f"_{measure}")(cell, file)
            result |= {"wall_seconds": time.perf_counter() - start, "hardware": describe_hardware()}
            with staged(destination(file, folder=False)) as made:
                write_text(made, json.dumps({"cell": identity, "result": result}, indent=1) + "\n")
            if unfinished.exists():
                shutil.rmtree(unfinished)
        return json.loads(file.read_text())["result"]

    def _perplexity(self, cell: Cell, file: Path) -> dict[str, Any]:
        if cell.recipe is None:
            return {"perplexity": perplexity(self.model, self.evaluation)}
        hidden = self.model.embed(self.evaluation)

        def watch(layer: LayerResult) -> None:
            self.model.forward(layer.index, jax.device_put(inside_layer(layer.index, layer.params)), hidden)

        figures = self._prune(cell.recipe, watch, file)
        return {"perplexity": perplexity_of_states(self.model, hidden, self.evaluation)} | figures

    def _seconds(self, cell: Cell, file: Path) -> dict[str, Any]:
        assert cell.recipe is not None
        return self._prune(cell.recipe, lambda layer: None, file)

    def _accuracy(self, cell: Cell, file: Path) -> dict[str, Any]:
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
            place = self.out / "checkpoints" / file.stem if self.args.keep else Path(folder) / "pruned"
            with create_checkpoint(place, reader.spec, reader.assets, overwrite=True) as writer:

                def watch(layer: LayerResult) -> None:
                    writer.write(layer.params)
                    account.layer_done(layer)

                figures = self._prune(cell.recipe, watch, file)
                account.divergences = figures["divergences"]
                for paths in other_params(reader.spec):
                    writer.write(reader.read(paths))
            pruned = self.model.sibling(place)
            account.evaluation = self._evaluator.measure_texts({"dense": self.model, "pruned": pruned}, "dense")
            self._evaluator.measure_alone(pruned, account.evaluation["pruned"])
        quality = account.evaluation["pruned"]
        found = {"perplexity": _only_perplexity(quality), "quality": quality.as_json(), "record": account.as_json()}
        return found | figures

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.options.plan(), self.model)

    def _prune(self, recipe: Recipe, watch: Any, file: Path) -> dict[str, Any]:
        layers = []
        clock = Clock()
        stream = self._stream(recipe)
        with contextlib.ExitStack() as stack:
            journal = None
            if stream:  # hours
                _unfinished(file).mkdir(parents=True, exist_ok=True)
                journal = stack.enter_context(contextlib.closing(Journal(_unfinished(file))))
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

    def _error(self, cell: Cell, file: Path) -> dict[str, Any]:
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


def _unfinished(file: Path) -> Path:
    """Where a cell's long tuning is kept until the cell's file is there."""
    return file.with_suffix(".unfinished")


def _only_perplexity(quality: Quality) -> float:
    (text,) = quality.texts.values()
    return text.perplexity


def _digest(content: np.ndarray | str) -> str:
    data = content.encode() if isinstance(content, str) else np.ascontiguousarray(content, np.int32).tobytes()
    return hashlib.sha256(data).hexdigest()[:12]
