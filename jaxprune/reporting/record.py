"""What jaxprune.json holds, version 3, and reading it.

Numbers are numbers: words for people are made from them and never read back.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import pydantic
from jaxtyping import Int
from pydantic import Field, PositiveInt

from convert.errors import DamagedError
from convert.files import read_bytes
from convert.paths import paths_of
from convert.schema import Count, Schema, parse
from jaxprune.calibration.text_stream import TuningText
from jaxprune.evaluation.quality import Quality
from jaxprune.evaluation.verification import Claims
from jaxprune.methods import Scalar
from jaxprune.planning.jit_versus_eager import Timing
from jaxprune.recipe import Recipe, effective, method_text, pattern_text
from jaxprune.solve.kernel import KernelResult
from jaxprune.solve.layer_result import LayerSummary
from jaxprune.sparsity.patterns import Given, OwnPattern
from jaxprune.structure.removal import Removed

RECORD, REPORT = "jaxprune.json", "report.html"
VERSION: Final = 3
RECORD_BYTES = 64 * 2**20
"""The most that a record may hold; one of a thousand layers has some megabytes."""
Share = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The shape of the windows of token ids, and their digest."""

    windows: tuple[Count, Count]
    sha256: str

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "w t"]) -> "Calibration":
        ids = np.ascontiguousarray(tokens, np.int32)
        windows, length = tokens.shape
        return cls((windows, length), hashlib.sha256(ids.tobytes()).hexdigest())


class Config(pydantic.BaseModel):
    """The options; those that the report shows by name, and all others as they were."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    out: str | None = None


class RunConfig(Config):
    ckpt: str
    calib: str | None = None
    tune_text: str | None = None


@dataclasses.dataclass(kw_only=True)
class Environment:
    """What software and hardware it ran on."""

    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    machine: str = ""
    devices: list[str] = dataclasses.field(default_factory=list)
    hardware: str = ""


@dataclasses.dataclass(kw_only=True)
class Run(Environment):
    """The record of a run.

    Attributes:
        config: what was asked for beside the recipe.
        checkpoint: the dense checkpoint, and what it is where its name does not say.
        recipe: what was done.
        calibration: the windows of token ids.
        tuning_text: the text that was tuned on, beside them; None: there was none.
        save_dtype: the dtype that the weights were cast to; None: each param has the dense
            checkpoint's.
        sparsity: zeros of all pruned kernels over their weights.
        evaluation: what was measured; empty where nothing was.
        seconds: by phase.
        timing: of the first layer with and without compilation, where that was asked for.
        divergences: number of tuned tokens, and then the divergence on held-out text, of each
            measure.
        removed: the parts that were removed before pruning.
        few_tokens: linear layer of an expert -> how many tokens it was given, where these are fewer
            than its inputs.
        peak_bytes: of the host's memory and the device's.
        disk_bytes: of the files that hold the weights.
        parameters: numbers in the checkpoint, which compare sizes at one dtype.
        converted_bytes: `packed`, or the type of a GGUF file -> about how many bytes the pruned
            checkpoint takes so, without the tokenizer.
        layers: what became of each layer.
        resumed_layers: layers that an earlier process of the run pruned.
    """

    schema: Literal[3] = VERSION
    kind: Literal["run"] = "run"
    config: RunConfig
    checkpoint: str = ""
    recipe: Recipe
    calibration: Calibration
    tuning_text: TuningText | None = None
    save_dtype: str | None = None
    sparsity: Share = 0.0
    evaluation: dict[str, Quality] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float | None] = dataclasses.field(default_factory=dict)
    timing: Timing | None = None
    divergences: list[tuple[Count, float]] = dataclasses.field(default_factory=list)
    removed: Removed = dataclasses.field(default_factory=Removed)
    few_tokens: dict[str, Count] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[str, Count] = dataclasses.field(default_factory=dict)
    disk_bytes: dict[str, Count] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Count] = dataclasses.field(default_factory=dict)
    converted_bytes: dict[str, Count] = dataclasses.field(default_factory=dict)
    layers: list[LayerSummary] = dataclasses.field(default_factory=list)
    resumed_layers: Count = 0

    @property
    def kernels(self) -> dict[tuple[int, str], KernelResult]:
        """(layer index, path of the linear layer) -> what became of its kernel."""
        return {
            (layer.index, path): kernel
            for layer in self.layers
            for path, kernel in layer.kernels.items()
        }

    @property
    def named(self) -> dict[tuple[int, str], OwnPattern | None]:
        """(layer index, path of the linear layer) -> the pattern of the last rule that names it;
        None: it is dense."""
        return {
            which: rule.pattern
            for rule in self.recipe.rules
            for which in self.kernels
            if rule.matches(*which)
        }

    @property
    def patterns_of_all(self) -> frozenset[OwnPattern | None]:
        """The patterns that rules give where they name every linear layer of the model; else
        empty."""
        named = self.named
        return frozenset(named.values()) if len(named) == len(self.kernels) else frozenset()

    @property
    def effective(self) -> Recipe:
        """The recipe without what changed nothing."""
        return effective(self.recipe, self.patterns_of_all)

    @property
    def method_text(self) -> str:
        """The method and what was done beside it, in words."""
        return method_text(self.recipe, self.patterns_of_all)

    @property
    def pattern_text(self) -> str:
        """The pattern or the masks' source, in words."""
        return pattern_text(self.recipe, self.patterns_of_all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A checkpoint of an evaluation; `run` is the record of the run that made it, where there is
    one."""

    sparsity: Share
    disk_bytes: Count | None = None
    parameters: Count | None = None
    run: Run | None
    quality: Quality


@dataclasses.dataclass(kw_only=True)
class Evaluation(Environment):
    """The record of an evaluation."""

    schema: Literal[3] = VERSION
    kind: Literal["evaluation"] = "evaluation"
    config: Config
    against: str | None
    checkpoints: Mapping[str, Measured]


Record = Run | Evaluation


def expected(run: Run) -> Claims:
    """Returns what a run's record says of its checkpoint."""
    kernels, pattern, total = run.kernels, run.recipe.pattern, None
    if run.effective.importance.max_deviation:  # every kernel had a sparsity of its own
        assert not isinstance(pattern, Given)
        total = round(pattern.sparsity * sum(kernel.size for kernel in kernels.values()))
    solved = run.recipe.prunes or run.effective.tuning.tunes or run.recipe.quantize
    reoptimized = {
        (int(index), path)
        for units in run.removed.units.values()
        for index, paths in units.errors.items()
        for path in paths
    }
    return Claims(
        pattern=None if total or isinstance(pattern, Given) else pattern,
        own=run.named,
        counts={which: kernel.zeros for which, kernel in kernels.items()},
        wanted={which: kernel.wanted for which, kernel in kernels.items()},
        projections={
            which: kernel.projections for which, kernel in kernels.items() if kernel.projections
        },
        total=total,
        reoptimized=reoptimized,
        solved=bool(solved),
        quantization=run.recipe.quantize,
    )


class _Head(Schema):
    version: PositiveInt = Field(alias="schema")
    kind: Literal["run", "evaluation"]


def load(path: Path) -> Record:
    """Reads the record in a folder, or in a file.

    Raises:
        UserError: there is none, or it is none that this version of jaxprune reads.
    """
    file = path / RECORD if os.path.isdir(path) else path
    return read(read_bytes(file, RECORD_BYTES), file)


def read(content: str | bytes, file: str | Path) -> Record:
    """Reads a record's JSON; errors as for `load`."""
    head = parse(_Head, content, file=file)
    if head.version != VERSION:
        raise DamagedError(
            "it was written by another version of jaxprune",
            file=file,
            entry="schema",
            found=head.version,
            wanted=str(VERSION),
        )
    if head.kind == "run":
        return parse(Run, content, file=file)
    return parse(Evaluation, content, file=file)


def run_of(checkpoint: str | Path) -> Run | None:
    """Reads the record of the run that made a checkpoint; None where it has none; errors as for
    `load`."""
    folder = next(iter(paths_of(str(checkpoint))), None)
    if folder is None or not os.path.lexists(folder / RECORD):
        return None
    record = load(folder)
    return record if isinstance(record, Run) else None
