"""The account of a run as it goes on, and the files that it and an evaluation leave: jaxprune.json,
report.html."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.hub import described
from convert.schema import as_text, check, dump, plain, to_text
from convert.writing import write_text
from jaxprune.calibration.stream import TextStream
from jaxprune.evaluation.quality import Quality
from jaxprune.evaluation.tasks import without_samples
from jaxprune.planning.machine import describe_hardware, peak_bytes
from jaxprune.planning.timing import Timing
from jaxprune.recipe import Recipe
from jaxprune.reporting import reading, schema
from jaxprune.reporting.schema import RECORD, REPORT
from jaxprune.solve.layer_result import LayerResult, LayerSummary
from jaxprune.streaming.observer import Observer

PACKAGES = (
    "jaxprune",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "gguf",
    "lm_eval",
)


@dataclasses.dataclass
class Record(Observer):
    """The account of a run as it goes on; it is told what happens, and `run` is the record.

    Attributes:
        config: what was asked for, with at least `ckpt`, `calib` and `out`.
        recipe: what is done to the model.
        tokens: calibration windows.
        stream: the text that is tuned on, beside them; None: there is none.
        divergences: tokens that were tuned on, and then the divergence on text held out, of each
            measure.
        layers: what became of the layers so far.
        resumed: layers that an earlier process of the run pruned; what else it spent its time on is
            not counted.
        seconds: the seconds by phase.
        evaluation: "dense" and "pruned" -> what was measured; empty without evaluation.
        timing: the timing of the first layer with and without compilation, where that was asked
            for.
        kept_experts: layer index -> the experts that stayed, where some were dropped.
        disk_bytes: "dense" and "pruned" -> bytes of the checkpoint's files.
        parameters: "dense" and "pruned" -> numbers in the checkpoint.
        converted_bytes: see `schema.Run`.
        save_dtype: the dtype that the weights were cast to; None: each param has the dense
            checkpoint's.
        few_tokens: linear layer of an expert -> how many tokens it was given, where these are fewer
            than its inputs.
    """

    config: Mapping[str, Any]
    recipe: Recipe
    tokens: np.ndarray
    stream: TextStream | None = None
    divergences: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    layers: list[LayerSummary] = dataclasses.field(default_factory=list)
    resumed: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Quality] = dataclasses.field(default_factory=dict)
    timing: Timing | None = None
    kept_experts: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    few_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    disk_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    converted_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    save_dtype: str | None = None

    def layer_done(self, result: LayerResult) -> None:
        """Keeps what became of a layer; of one that is quantized in place of the one before."""
        self.layers[result.index : result.index + 1] = [result.figures]
        self.resumed += result.resumed
        for path, kernel in result.kernels.items():
            if kernel.few_tokens:
                self.few_tokens[f"layers.{result.index}.{path}"] = int(kernel.stats["tokens"])
        for phase, seconds in result.figures.seconds.items():
            self.phase_timed(phase, seconds)

    def layer_tuned(self, result: LayerResult) -> None:
        """Keeps what became of a layer's kernels, which is another where zeros came late."""
        self.layers[result.index] = result.figures

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        """Keeps a measure."""
        self.divergences.append((tokens, divergence))

    def phase_timed(self, phase: str, seconds: float) -> None:
        """Adds to the seconds of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def asked(self) -> dict[str, Any]:
        """Returns the recipe, and what it was applied to, as JSON."""
        text = {"tuning_text": dump(self.stream.identity)} if self.stream else {}
        calibration = schema.Calibration.of(self.tokens)
        return {"recipe": dump(self.recipe), "calibration": dump(calibration)} | text

    def run(self) -> schema.Run:
        """Returns the record of the run so far."""
        zeros, size = (sum(getattr(one, name) for one in self.layers) for name in ("zeros", "size"))
        return schema.Run(
            config=check(schema.RunConfig, plain(self.config), file="", entry="config"),
            checkpoint=described(self.config["ckpt"]),
            recipe=self.recipe,
            calibration=schema.Calibration.of(self.tokens),
            tuning_text=self.stream.identity if self.stream else None,
            save_dtype=self.save_dtype,
            sparsity=zeros / max(1, size),
            evaluation=self.evaluation,
            seconds=self.seconds,
            timing=self.timing,
            divergences=self.divergences,
            kept_experts={str(index): kept for index, kept in self.kept_experts.items()},
            few_tokens=self.few_tokens,
            peak_bytes=peak_bytes(),
            disk_bytes=self.disk_bytes,
            parameters=self.parameters,
            converted_bytes=self.converted_bytes,
            layers=self.layers,
            resumed_layers=self.resumed,
            **environment(),
        )


def write_record(
    folder: Path, record: schema.Record, qualities: Mapping[str, Quality]
) -> tuple[set[str], Exception | None]:
    """Writes jaxprune.json, lm-eval's results where there are any, and report.html.

    Args:
        folder: the folder that is being made.
        record: the content of jaxprune.json.
        qualities: checkpoint -> what was measured of it.

    Returns:
        The files' names, and what kept the report from being drawn, for the caller to raise when
        all else is in its place.
    """
    from jaxprune.reporting import report  # with matplotlib, which is slow to import

    files = {RECORD: to_text(dump(record))}
    for name, quality in qualities.items():
        if quality.lm_eval:
            files[lm_eval_file(name)] = to_text(json.loads(without_samples(quality.lm_eval)))
    for name, text in files.items():
        write_text(folder / name, text)
    try:
        page = report.page([reading.read(files[RECORD], folder / RECORD)])
    # a defect of ours, which must not cost what took hours: the caller raises it later
    except Exception as error:
        return set(files), error
    write_text(folder / REPORT, page)
    return {*files, REPORT}, None


def environment() -> dict[str, Any]:
    """Returns the fields of `schema.Environment`: what software and hardware this process runs
    on."""
    return {
        "versions": versions(),
        "machine": platform.machine(),
        "devices": sorted({d.device_kind for d in jax.local_devices()}),
        "hardware": describe_hardware(),
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of what results depend on; None: it is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lm_eval_file(name: str) -> str:
    """Returns the name of the file of lm-eval's results; one of a very long name is told apart by a
    digest."""
    name = as_text(name).replace("/", "-")
    if len(name.encode()) > 200:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"lm-eval-{name}.json"
