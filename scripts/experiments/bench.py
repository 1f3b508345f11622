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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from experiments import Experiment

from convert import create_checkpoint
from convert.destination import destination, staged
from convert.schema import dump
from convert.writing import write_text
from jaxprune import (
    Context,
    InputError,
    Magnitude,
    TextStream,
    Unstructured,
    calibration,
    load,
    prune_model,
)
from jaxprune.api import snapshot as snapshots
from jaxprune.commands.prune import stream_of, windows_of
from jaxprune.commands.run_options import Config
from jaxprune.evaluation.perplexity import compare, short_name
from jaxprune.evaluation.quality import Evaluator, Quality
from jaxprune.evaluation.tasks import ZERO_SHOT
from jaxprune.loop import other_params
from jaxprune.planning.this_machine import describe_hardware
from jaxprune.recipe import Recipe
from jaxprune.reporting import record as records
from jaxprune.reporting.recording_observer import RecordingObserver, environment
from jaxprune.run_store.store import RunStore
from jaxprune.solve.layer_result import LayerResult
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel, inside_layer

SMALL = {
    "nsamples": 16,
    "seqlen": 512,
    "eval_seqlen": 512,
    "eval_windows": 16,
    "pack": True,
    "limit": 500,
}
"""What --small changes: minutes on two cores with a model of 135M weights."""
RESULTS = Path(__file__).parents[2] / ".ci" / "unchanged-since"
"""Names the first commit whose results are those of this one."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: a recipe on a checkpoint, or (recipe None) the dense checkpoint."""

    row: str
    pattern: str
    step: int | None
    recipe: Recipe | None
    linear: tuple[int, str] | None = None
    seed: int = 0
    """Added to the seed of the command line."""


class Bench:
    """A checkpoint with its texts, on which cells are measured.

    Args:
        args: of the command line.
        experiment: gives the tokens of a window, where the command line does not say, and the
            layers to look at.
    """

    def __init__(self, args: argparse.Namespace, experiment: Experiment) -> None:
        small = SMALL if args.small else {}

        def setting(name: str, default: Any) -> Any:
            given = getattr(args, name)
            return small.get(name, default) if given is None else given

        self.ckpt, self.out, self.args = args.ckpt, Path(args.out), args
        seqlen = setting("seqlen", experiment.seqlen)
        calib, held_out = args.calib, list[str]()
        if args.hold_out:
            calib, *held_out = _split(Path(args.calib), args.hold_out, self.out / "texts")
        # The same options as the command line's, for the records of runs.
        self.options = Config(
            ckpt=args.ckpt,
            calib=calib,
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
        self.texts = [args.eval_text, *held_out]
        self.calibrations: dict[int, np.ndarray] = {}
        self.dense_states: dict[str, HiddenStates] = {}
        self.calibration = self.windows(Cell("dense", "", None, None))

    def windows(self, cell: Cell) -> np.ndarray:
        """The windows that a cell is calibrated on."""
        if cell.seed not in self.calibrations:
            self.calibrations[cell.seed] = windows_of(self._options(cell), self.model)
        return self.calibrations[cell.seed]

    def _options(self, cell: Cell) -> Config:
        return dataclasses.replace(self.options, seed=self.args.seed + cell.seed)

    @functools.cached_property
    def evaluation(self) -> dict[str, np.ndarray]:
        """The windows of each evaluation text."""
        options, found = self.options, {}
        for text in self.texts:
            tokenizer = None if text.endswith(".npy") else self.model.tokenizer
            found[text] = calibration.evaluation_windows(
                text, tokenizer, options.eval_seqlen, options.eval_windows
            )
        return found

    def setup(self, measure: str, cell: Cell) -> dict[str, Any]:
        """What decides a cell's outcome beside its recipe."""
        texts = {} if cell.recipe is None else {"calibration": self.windows(cell)}
        if measure in ("perplexity", "quality", "accuracy"):
            names = self.texts if measure == "quality" else self.texts[:1]
            texts |= {short_name(name): self.evaluation[name] for name in names}
        setup = {
            "checkpoint": self.ckpt,
            "dtype": str(self.model.dtype),
            "measure": measure,
            "seed": self.args.seed + cell.seed,
            "results": RESULTS.read_text().strip() if RESULTS.exists() else None,
            "jax": jax.__version__,
        }
        if measure == "seconds":
            setup["hardware"] = describe_hardware()
        setup |= {name: [*tokens.shape, _digest(tokens)] for name, tokens in texts.items()}
        if measure == "accuracy":
            setup |= {name: getattr(self.options, name) for name in ("tasks", "limit", "backend")}
        return setup

    def measure(self, measure: str, cell: Cell) -> dict[str, Any] | None:
        """A cell's results, from its file or measured now; None where it is not to be measured."""
        identity = self.setup(measure, cell)
        if cell.recipe is None:
            identity["recipe"] = "dense"
        else:
            # So that a new option makes no cell of the old ones useless.
            identity["recipe"] = dump(cell.recipe, defaults=False)
            if stream := self._stream(cell):
                identity["tuning_text"] = dump(stream.identity)
        if cell.linear:
            identity["linear"] = list(cell.linear)
        name = "dense" if cell.recipe is None else cell.recipe.slug
        file = (
            self.out
            / "cells"
            / f"{measure}-{name}-{_digest(json.dumps(identity, sort_keys=True))}.json"
        )
        if not file.exists():
            args = self.args
            if args.only_measured or (args.patterns and cell.pattern not in ("", *args.patterns)):
                return None
            if args.rows and cell.row not in ("dense", *args.rows):
                return None
            start, unfinished = time.perf_counter(), _unfinished(file)
            result = {"resumed": True} if unfinished.exists() else {}
            result |= getattr(self, f"_{measure}")(cell, file)
            result |= {"wall_seconds": time.perf_counter() - start, **environment()}
            with staged(destination(file, folder=False)) as made:
                write_text(made, json.dumps({"cell": identity, "result": result}, indent=1) + "\n")
            if unfinished.exists():
                shutil.rmtree(unfinished)
        return json.loads(file.read_text())["result"]

    def _perplexity(self, cell: Cell, file: Path) -> dict[str, Any]:
        return self._predictions(cell, file, self.texts[:1], [])

    def _quality(self, cell: Cell, file: Path) -> dict[str, Any]:
        return self._predictions(cell, file, self.texts, [self.model])

    def _predictions(
        self, cell: Cell, file: Path, names: Sequence[str], dense: list[StreamedModel]
    ) -> dict[str, Any]:
        """The perplexity of the first text; and what each text says, compared with the dense
        model's predictions where it is given."""
        hidden = {name: self.model.embed(self.evaluation[name]) for name in names}

        def watch(layer: LayerResult) -> None:
            params = jax.device_put(inside_layer(layer.index, layer.params))
            for states in hidden.values():
                self.model.forward(layer.index, params, states)

        figures = {}
        if cell.recipe is None:
            hidden = {name: self._dense_states(name) for name in names}
        else:
            figures = _figures(self._prune(cell, watch, file).record)
        texts = {}
        for name, states in hidden.items():
            both = [*(self._dense_states(name) for _ in dense), states]
            *_, quality = compare([*dense, self.model], both, self.evaluation[name])
            texts[short_name(name)] = dump(quality)
        return {"perplexity": next(iter(texts.values()))["perplexity"], "texts": texts} | figures

    def _dense_states(self, name: str) -> HiddenStates:
        """The dense model's hidden states after its last layer, computed once for each text."""
        if name not in self.dense_states:
            (self.dense_states[name],) = self.model.final_states(self.evaluation[name])
        return self.dense_states[name]

    def _seconds(self, cell: Cell, file: Path) -> dict[str, Any]:
        assert cell.recipe is not None
        return _figures(self._prune(cell, lambda layer: None, file).record)

    def _accuracy(self, cell: Cell, file: Path) -> dict[str, Any]:
        """Accuracies and perplexity; and for the report a record as a run or an evaluation leaves
        it."""
        if cell.recipe is None:
            ((_, quality),) = self._evaluator.measure({self.ckpt: self.model})
            one = {"sparsity": 0.0, "run": None, "quality": dump(quality)}
            record = {
                "schema": records.VERSION,
                "kind": "evaluation",
                "config": dataclasses.asdict(self.options),
                "against": self.ckpt,
            }
            record |= {"checkpoints": {self.ckpt: one}, **environment()}
            return {
                "perplexity": _only_perplexity(quality),
                "quality": _with_mean(quality),
                "record": record,
            }
        reader = self.model.reader
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            place = (
                self.out / "checkpoints" / file.stem if self.args.keep else Path(folder) / "pruned"
            )
            with create_checkpoint(place, reader.spec, reader.assets, overwrite=True) as writer:
                account = self._prune(cell, lambda layer: writer.write(layer.params), file)
                for paths in other_params(reader.spec):
                    writer.write(reader.read(paths))
            pruned = self.model.sibling(place)
            account.record.evaluation = self._evaluator.measure_texts(
                {"dense": self.model, "pruned": pruned}, "dense"
            )
            self._evaluator.measure_alone(pruned, account.record.evaluation["pruned"])
        quality = account.record.evaluation["pruned"]
        found = {
            "perplexity": _only_perplexity(quality),
            "quality": _with_mean(quality),
            "record": dump(account.run()),
        }
        return found | _figures(account.record)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.options.plan(), self.model)

    def _prune(
        self, cell: Cell, watch: Callable[[LayerResult], None], file: Path
    ) -> RecordingObserver:
        """Prunes the model; `watch` is given each layer."""
        recipe, windows, stream = cell.recipe, self.windows(cell), self._stream(cell)
        assert recipe is not None
        config = dataclasses.replace(self._options(cell), out=recipe.slug)
        account = RecordingObserver(dataclasses.asdict(config), recipe, windows, stream)
        with contextlib.ExitStack() as stack:
            store = None
            if stream:  # hours
                _unfinished(file).mkdir(parents=True, exist_ok=True)
                store = stack.enter_context(contextlib.closing(RunStore(_unfinished(file))))
            for layer in prune_model(
                self.model,
                windows,
                recipe,
                stream=stream,
                seed=config.seed,
                context=Context(store, account),
            ):
                watch(layer)
        # Medians leave out the first layer's compilation and the machine's hiccups.
        layers = account.record.layers
        for phase in layers[0].seconds:
            account.record.seconds[phase] = statistics.median(
                layer.seconds[phase] for layer in layers
            ) * len(layers)
        return account

    def _stream(self, cell: Cell) -> TextStream | None:
        return cell.recipe and stream_of(self._options(cell), cell.recipe, self.model)

    def _error(self, cell: Cell, file: Path) -> dict[str, Any]:
        assert cell.recipe is not None and cell.linear is not None
        layer, linear = cell.linear
        snapshot = self._snapshots[layer].only(linear)
        ((_, result, _, _),) = snapshots.solve(snapshot, cell.recipe.method, cell.recipe.target())
        return {"error": result.error}

    @functools.cached_property
    def _snapshots(self) -> dict[int, snapshots.Snapshot]:
        """The wanted layers' snapshots, after dense layers."""
        recipe = Recipe(Magnitude(), Unstructured(0.0))
        return {
            layer: snapshots.capture(
                self.model, self.calibration, layer, recipe, prune_before=False
            )
            for layer in self.layers
        }


def _split(file: Path, count: int, folder: Path) -> tuple[str, str]:
    """Writes the documents of a file but its last, and its last so many; returns both files."""
    lines = file.read_bytes().splitlines(keepends=True)
    if not 0 < count < len(lines):
        raise InputError(
            f"--hold-out {count}: {file} has {len(lines)} documents, some of which must be left"
        )
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"rest": lines[:-count], "held-out": lines[-count:]}
    for name, part in parts.items():
        (folder / f"{name}-{count}-{file.name}").write_bytes(b"".join(part))
    rest, held_out = (str(folder / f"{name}-{count}-{file.name}") for name in parts)
    return rest, held_out


def _figures(record: records.Run) -> dict[str, Any]:
    """What is kept of a pruning."""
    kernels = {
        f"{layer.index}.{path}": kernel
        for layer in record.layers
        for path, kernel in layer.kernels.items()
    }
    figures = {"seconds": record.seconds, "divergences": record.divergences}
    return {"error": statistics.mean(kernel.error for kernel in kernels.values())} | figures


def _unfinished(file: Path) -> Path:
    """Where a cell's long tuning is kept until the cell's file is there."""
    return file.with_suffix(".unfinished")


def _with_mean(quality: Quality) -> dict[str, Any]:
    """What was measured, as JSON, and the mean accuracy."""
    return {**dump(quality), "mean_accuracy": quality.mean_accuracy}


def _only_perplexity(quality: Quality) -> float:
    (text,) = quality.texts.values()
    return text.perplexity


def _digest(content: np.ndarray | str) -> str:
    data = (
        content.encode()
        if isinstance(content, str)
        else np.ascontiguousarray(content, np.int32).tobytes()
    )
    return hashlib.sha256(data).hexdigest()[:12]
