"""The observer that records a run, and the files that a run and an evaluation leave: jaxprune.json,
lm-eval's results, report.html."""

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
from jaxprune.calibration.text_stream import TextStream
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Quality
from jaxprune.evaluation.tasks import without_samples
from jaxprune.planning.this_machine import describe_hardware, peak_bytes
from jaxprune.recipe import Recipe
from jaxprune.reporting.record import (
    RECORD,
    REPORT,
    Calibration,
    Record,
    Run,
    RunConfig,
    read,
)
from jaxprune.solve.layer_result import LayerResult
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


class RecordingObserver(Observer):
    """Observes a run and collects the run's record.

    Args:
        config: what was asked for, with at least `ckpt`, `calib` and `out`.
        recipe: what is done to the model.
        tokens: calibration windows.
        stream: the text that is tuned on, beside them; None: there is none.
        save_dtype: the dtype that the weights are cast to; None: each param has the dense
            checkpoint's.

    Attributes:
        record: the record so far; `run` completes it.

    Raises:
        InputError: what was asked for has values that no record can hold.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        recipe: Recipe,
        tokens: np.ndarray,
        stream: TextStream | None = None,
        save_dtype: str | None = None,
    ) -> None:
        self.record = Run(
            config=check(RunConfig, plain(config), file="", entry="config", error=InputError),
            checkpoint=described(config["ckpt"]),
            recipe=recipe,
            calibration=Calibration.of(tokens),
            tuning_text=stream.identity if stream else None,
            save_dtype=save_dtype,
        )

    def layer_done(self, result: LayerResult) -> None:
        """Keeps what became of a layer; of one that is quantized in place of the one before."""
        record = self.record
        record.layers[result.index : result.index + 1] = [result.figures]
        record.resumed_layers += result.resumed
        for path, kernel in result.kernels.items():
            if kernel.few_tokens:
                record.few_tokens[f"layers.{result.index}.{path}"] = int(kernel.stats["tokens"])
        for phase, seconds in result.figures.seconds.items():
            self.phase_timed(phase, seconds)

    def layer_tuned(self, result: LayerResult) -> None:
        """Keeps what became of a layer's kernels, which is another where pruning was gradual."""
        self.record.layers[result.index] = result.figures

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        """Keeps a measure."""
        self.record.divergences.append((tokens, divergence))

    def phase_timed(self, phase: str, seconds: float) -> None:
        """Adds to the seconds of a phase."""
        self.record.seconds[phase] = (self.record.seconds.get(phase) or 0.0) + seconds

    def asked(self) -> dict[str, Any]:
        """Returns the recipe, and what it was applied to, as JSON."""
        entries = {name: getattr(self.record, name) for name in ("recipe", "calibration")}
        if self.record.tuning_text:
            entries["tuning_text"] = self.record.tuning_text
        return {name: dump(value) for name, value in entries.items()}

    def run(self) -> Run:
        """Returns the record of the run so far."""
        layers = self.record.layers
        zeros, size = (sum(getattr(one, name) for one in layers) for name in ("zeros", "size"))
        return dataclasses.replace(
            self.record, sparsity=zeros / max(1, size), peak_bytes=peak_bytes(), **environment()
        )


def write_record(
    folder: Path, record: Record, qualities: Mapping[str, Quality]
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
        page = report.page([read(files[RECORD], folder / RECORD)])
    # a defect of ours, which must not cost what took hours: the caller raises it later
    except Exception as error:
        return set(files), error
    write_text(folder / REPORT, page)
    return {*files, REPORT}, None


def environment() -> dict[str, Any]:
    """Returns the fields of `record.Environment`: what software and hardware this process runs
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
    """Returns the name of the file of lm-eval's results; one of a very long name is distinguished
    by a digest."""
    name = as_text(name).replace("/", "-")
    if len(name.encode()) > 200:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"lm-eval-{name}.json"
