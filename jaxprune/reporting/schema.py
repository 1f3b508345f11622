"""What jaxprune.json holds, version 2.

Numbers are numbers: words for people are made from them and never read back.
"""

from typing import Any, Literal

import pydantic
from pydantic import Field

from convert.schema import Count, Schema, parse, to_text
from jaxprune.methods.records import Scalar
from jaxprune.models.parts import every_expert
from jaxprune.recipe import RecipeRecord
from jaxprune.sparsity.patterns import Pattern

RECORD, REPORT = "jaxprune.json", "report.html"
VERSION = 2
RECORD_BYTES = 64 * 2**20
"""The most that a record may hold; one of a thousand layers has some megabytes."""


Seconds = dict[str, float | None]


class Calibration(Schema):
    """The shape of the windows of token ids, and their digest."""

    windows: tuple[Count, Count]
    sha256: str


class TuningText(Schema):
    """The digest of the text that was tuned on, and what decides which windows it gave: their
    length, the seed of their order, how many were held out, and the digest of those."""

    sha256: str
    length: Count
    seed: int
    held_out: Count
    held_out_sha256: str


class TextQuality(Schema):
    """What a checkpoint makes of a text; null stands for a number that is not finite, or was not
    measured."""

    windows: tuple[Count, Count]
    perplexity: float | None = Field(default=None, gt=0)
    ratio: float | None = None
    kl: float | None = None
    top1: float | None = None


class Sample(Schema):
    """A prompt and its continuation, token by token."""

    prompt: str
    pieces: list[str]


class MeanAccuracy(Schema):
    acc: float | None = None
    acc_stderr: float | None = None


class Quality(Schema):
    """See `evaluation.quality.Quality`."""

    texts: dict[str, TextQuality] = {}
    tasks: dict[str, dict[str, float | None]] = {}
    groups: list[str] = []
    mean_accuracy: MeanAccuracy = MeanAccuracy()
    samples: list[Sample] = []
    seconds: Seconds = {}


class Kernel(Schema):
    """What became of one kernel; see `pruning.kernel.KernelResult`."""

    error: float | None
    zeros: Count
    wanted: Count
    size: int = Field(ge=1, le=2**53)
    stats: dict[str, float | None] = {}
    sections: dict[str, Count] = {}

    @pydantic.model_validator(mode="after")
    def _no_more_than_all(self) -> "Kernel":
        if max(self.zeros, self.wanted) > self.size:
            raise ValueError("no more zeros than weights")
        return self


class Layer(Schema):
    index: Count
    seconds: Seconds
    linears: dict[str, Kernel] = Field(min_length=1)

    def __getitem__(self, path: str) -> Kernel:
        return self.linears[path]

    @property
    def zeros(self) -> int:
        """Zeros of the layer's kernels."""
        return sum(linear.zeros for linear in self.linears.values())

    @property
    def size(self) -> int:
        """Weights of the layer's kernels."""
        return sum(linear.size for linear in self.linears.values())

    def with_experts_together(self) -> "Layer":
        """Returns the layer with the linear layers of all experts that are called the same as one:
        mean errors."""
        grouped: dict[str, list[Kernel]] = {}
        for path, linear in self.linears.items():
            grouped.setdefault(every_expert(path), []).append(linear)
        linears = {
            path: ones[0] if len(ones) == 1 else _together(ones) for path, ones in grouped.items()
        }
        return self.model_copy(update={"linears": linears})


def _together(linears: list[Kernel]) -> Kernel:
    errors = [linear.error for linear in linears if linear.error is not None]
    sums = {
        name: sum(getattr(linear, name) for linear in linears)
        for name in ("zeros", "wanted", "size")
    }
    return Kernel(error=sum(errors) / len(errors) if errors else None, **sums)


class Config(pydantic.BaseModel):
    """The options; those that the report shows by name, and all others as they were."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    out: str | None = None


class RunConfig(Config):
    ckpt: str
    calib: str | None = None
    tune_text: str | None = None


class Environment(Schema):
    """What software and hardware it ran on."""

    versions: dict[str, str | None] = {}
    machine: str = ""
    devices: list[str] = []
    hardware: str = ""


class Timing(Schema):
    """See `timing.Timing`."""

    first: Seconds
    jit: Seconds
    eager: Seconds
    equal: float | None


class Run(RecipeRecord, Environment):
    """The record of a run.

    Attributes:
        disk_bytes: of the files that hold the weights.
        parameters: numbers in the checkpoint, which compare sizes at one dtype.
        save_dtype: the dtype that the weights were cast to; None: each param has the dense
            checkpoint's.
        converted_bytes: `packed`, or the type of a GGUF file -> about how many bytes the pruned
            checkpoint takes so, without the tokenizer.
    """

    version: Literal[2] = Field(alias="schema")
    kind: Literal["run"]
    config: RunConfig
    checkpoint: str = ""
    calibration: Calibration
    save_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    sparsity: float = Field(ge=0, le=1)
    evaluation: dict[Literal["dense", "pruned"], Quality]
    seconds: Seconds
    timing: Timing | None = None
    peak_bytes: dict[str, Count] = {}
    disk_bytes: dict[Literal["dense", "pruned"], Count] = {}
    parameters: dict[Literal["dense", "pruned"], Count] = {}
    converted_bytes: dict[str, Count] = {}
    tuning_text: TuningText | None = None
    divergences: list[tuple[Count, float]] = []
    kept_experts: dict[str, list[Count]] = {}
    few_tokens: dict[str, Count] = {}
    layers: list[Layer]
    resumed_layers: Count = 0

    @property
    def named(self) -> dict[tuple[int, str], Pattern | None]:
        """(layer index, path of the linear layer) -> the pattern of the last rule that names it;
        None: it is dense."""
        rules = [one.rule() for one in self.rules]
        every = [(layer.index, path) for layer in self.layers for path in layer.linears]
        return {which: rule.pattern for rule in rules for which in every if rule.matches(*which)}

    @property
    def patterns_of_all(self) -> frozenset[Pattern | None]:
        """The patterns that rules give where they name every linear layer of the model; else
        empty."""
        named, every = self.named, sum(len(layer.linears) for layer in self.layers)
        return frozenset(named.values()) if len(named) == every else frozenset()


class Measured(Schema):
    """A checkpoint of an evaluation; `run` is the record of the run that made it, where there is
    one."""

    sparsity: float = Field(ge=0, le=1)
    disk_bytes: Count | None = None
    parameters: Count | None = None
    run: Run | None
    quality: Quality


class Evaluation(Environment):
    """The record of an evaluation."""

    version: Literal[2] = Field(alias="schema")
    kind: Literal["evaluation"]
    config: Config
    against: str | None
    checkpoints: dict[str, Measured]


Record = Run | Evaluation


def run_of_json(value: dict[str, Any]) -> Run:
    """Returns the record that `record.Record.as_json` gave."""
    return parse(Run, to_text(value), file=RECORD)


def expected(run: Run) -> dict[str, Any]:
    """Returns what a run's record says of its checkpoint, as `evaluation.verification.verify` takes
    it."""
    kernels = {
        (layer.index, path): kernel
        for layer in run.layers
        for path, kernel in layer.linears.items()
    }
    pattern, total = run.pattern.pattern(), None
    if pattern and run.effective.importance.spread:  # every kernel had a sparsity of its own
        total = round(pattern.sparsity * sum(kernel.size for kernel in kernels.values()))
        pattern = None
    return {
        "pattern": pattern,
        "own": run.named,
        "counts": {which: kernel.zeros for which, kernel in kernels.items()},
        "wanted": {which: kernel.wanted for which, kernel in kernels.items()},
        "sections": {
            which: kernel.sections for which, kernel in kernels.items() if kernel.sections
        },
        "total": total,
        "quantization": run.quantize,
    }


def as_json(record: pydantic.BaseModel) -> dict[str, Any]:
    """Returns what `read` made a record of."""
    return record.model_dump(mode="json", by_alias=True)
