"""What a run leaves behind for people and programs: jaxprune.json, a report, a model card, the table at the end."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.hub import described
from convert.ownership import write_text
from jaxprune.commands.config import Config
from jaxprune.evaluation.quality import Quality, table
from jaxprune.evaluation.tasks import without_samples
from jaxprune.planning.timing import Timing
from jaxprune.pruning.results import LayerResult
from jaxprune.recipe import Recipe
from jaxprune.reporting import report, schema, version1
from jaxprune.reporting.report import REPORT
from jaxprune.reporting.schema import RECORD

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
class Record:
    """The account of a run; `as_json` is what jaxprune.json holds.

    Attributes:
        config: all options, resolved.
        recipe: method and pattern.
        tokens: calibration windows.
        layers: figures of the layers so far.
        seconds: by phase.
        evaluation: "dense" and "pruned" -> what was measured; empty without evaluation.
        timing: of the first layer with and without compilation, where that was asked for.
    """

    config: Config
    recipe: Recipe
    tokens: np.ndarray
    layers: list[LayerResult] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Quality] = dataclasses.field(default_factory=dict)
    timing: Timing | None = None

    def add(self, layer: LayerResult) -> None:
        """Keeps a layer's figures, not its params."""
        self.layers.append(dataclasses.replace(layer, params={}, masks={}))
        for phase, seconds in layer.seconds.items():
            self.spend(phase, seconds)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def checkpoint(self) -> str:
        """The dense checkpoint, and what it is where its name does not say."""
        return described(self.config.ckpt)

    @property
    def sparsity(self) -> float:
        """Zeros of all pruned linears over their weights."""
        linears = [linear for layer in self.layers for linear in layer.linears.values()]
        return sum(linear.zeros for linear in linears) / max(1, sum(linear.size for linear in linears))

    @property
    def resumed(self) -> int:
        """Layers that an earlier process of the run pruned; what else it spent its time on is not counted."""
        return sum(layer.resumed for layer in self.layers)

    def what_was_asked(self) -> dict[str, Any]:
        """The recipe, and what it was applied to, as JSON."""
        return self.recipe.as_json() | {"calibration": self._calibration()}

    def what_version_1_wrote(self) -> dict[str, Any]:
        """The same as a journal of version 1 has it."""
        return version1.recipe_as_json(self.recipe) | {"calibration": self._calibration()}

    def _calibration(self) -> dict[str, Any]:
        ids = np.ascontiguousarray(self.tokens, np.int32)
        return {"windows": list(self.tokens.shape), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": schema.VERSION,
            "kind": "run",
            "config": dataclasses.asdict(self.config),
            "checkpoint": self.checkpoint,
            **self.what_was_asked(),
            "sparsity": self.sparsity,
            "evaluation": {which: quality.as_json() for which, quality in self.evaluation.items()},
            "seconds": self.seconds,
            **({"timing": self.timing._asdict()} if self.timing else {}),
            "peak_bytes": peak_bytes(),
            "layers": [layer.figures() for layer in self.layers],
            "resumed_layers": self.resumed,
            **environment(),
        }

    def save(self, folder: Path) -> tuple[set[str], Exception | None]:
        """Writes jaxprune.json, lm-eval's results, the model card and report.html.

        Returns:
            The files' names, and what kept the report from being drawn, for the caller to raise when all else is in
            its place.
        """
        write_text(folder / "README.md", schema.as_text(self.card()))
        names, fault = write_record(folder, self.as_json(), self.evaluation)
        return names | {"README.md"}, fault

    def card(self) -> str:
        """The model card: what was done to which model, and how good it is."""
        config, rows = self.config, "".join(map(_row, self.summary()))
        measured = ""
        if self.evaluation:
            header, cells = table(self.evaluation)
            measured = "\n" + "".join(map(_row, [header, ["---"] * len(header), *cells]))
        base = f"base_model: {config.ckpt}\n" if "/" in config.ckpt and not Path(config.ckpt).exists() else ""
        return f"""---
{base}tags:
- pruned
- sparse
- jaxprune
---

# {_escaped(Path(config.ckpt).name)}, pruned to {_escaped(self.recipe.target)}

{_escaped(self.checkpoint)}, pruned in one shot by jaxprune, which implements Boža, "Fast and Effective Weight Update
for Pruned Large Language Models" (arXiv 2401.02938). The weights are ordinary dense tensors with exact zeros.
Embeddings, norms and head are those of the dense checkpoint. Everything needed to repeat the run is in {RECORD}.

| | |
|---|---|
{rows}{measured}"""

    def summary(self) -> Sequence[tuple[str, str]]:
        """The rows of the table at the end of a run."""
        config = self.config
        rows = [
            ("checkpoint", self.checkpoint),
            ("method", self.recipe.name),
            ("pattern", self.recipe.target),
            ("calibration", f"{self.tokens.shape[0]} windows of {self.tokens.shape[1]} tokens, {config.calib}"),
            ("sparsity of the linears", f"{100 * self.sparsity:.4f} %"),
        ]
        if self.resumed:
            rows.append(("resumed", f"{self.resumed} of {len(self.layers)} layers were pruned before"))
        rows += [(f"time, {phase}", f"{seconds:.1f} s") for phase, seconds in self.seconds.items()]
        rows += [(f"peak memory, {where}", f"{size / 1e9:.2f} GB") for where, size in peak_bytes().items()]
        return rows


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(_escaped, cells))} |\n"


def _escaped(text: str) -> str:
    """A name on one line, none of whose characters is Markdown's or HTML's."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"([\\|`*\[\]$])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")


def layer_line(layer: LayerResult, count: int) -> str:
    """One line on a finished layer: relative errors in percent, sparsity, seconds."""
    errors = "  ".join(
        f"{path.rpartition('.')[2].removesuffix('_proj')} {100 * linear.error:.3g}"
        for path, linear in layer.linears.items()
    )
    zeros, size = (sum(getattr(linear, name) for linear in layer.linears.values()) for name in ("zeros", "size"))
    seconds = "  ".join(f"{phase} {value:.1f}" for phase, value in layer.seconds.items())
    raised = max(linear.stats.get("damping_times", 1) for linear in layer.linears.values())
    seconds += f"  damping raised {raised:g} times" * (raised > 1)
    return f"layer {layer.index + 1}/{count}  error %: {errors}  sparsity {100 * zeros / size:.2f} %  s: {seconds}"


def peak_bytes() -> dict[str, int]:
    """Peak memory of this process, and of each kind of device that keeps count."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for device in jax.local_devices():
        if used := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            peaks[device.platform] = max(used, peaks.get(device.platform, 0))
    return peaks


def write_record(
    folder: Path, record: Mapping[str, Any], qualities: Mapping[str, Quality]
) -> tuple[set[str], Exception | None]:
    """Writes jaxprune.json, lm-eval's results where there are any, and report.html; returns as `Record.save`."""
    content = schema.write(record)
    files = {RECORD: content}
    for name, quality in qualities.items():
        if quality.lm_eval:
            files[lm_eval_file(name)] = schema.write(json.loads(without_samples(quality.lm_eval)))
    for name, text in files.items():
        write_text(folder / name, text)
    try:
        page = report.page([schema.read(content, folder / RECORD)])
    except Exception as error:  # a defect of ours, which must not cost what took hours: the caller raises it later
        return set(files), error
    write_text(folder / REPORT, page)
    return {*files, REPORT}, None


def environment() -> dict[str, Any]:
    """What software and hardware this process runs on."""
    return {
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": platform.machine(),
        "devices": sorted({d.device_kind for d in jax.local_devices()}),
        "hardware": hardware(),
    }


def hardware() -> str:
    """The devices, in words."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {models[0] if models else platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lm_eval_file(name: str) -> str:
    """The file of lm-eval's results of a checkpoint; one of a very long name is told apart by a digest."""
    name = schema.as_text(name).replace("/", "-")
    if len(name.encode()) > 200:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"lm-eval-{name}.json"
