"""What jaxprune.json holds, version 2, and how any JSON of ours is written.

Numbers are numbers: words for people are made from them and never read back. Files of version 1 are read through
`version1`, which makes of them what this module declares.
"""

import json
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from convert.errors import DamagedError
from convert.files import read_bytes
from convert.schema import Schema, parse

RECORD = "jaxprune.json"
VERSION = 2
RECORD_BYTES = 64 * 2**20
"""The most that a record may hold; one of a thousand layers has some megabytes."""
MOST = 1.7e308
"""The largest number that an option may have."""


Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = dict[str, float | None]


def percent(fraction: float) -> str:
    """A fraction in percent with all its digits, so that two fractions never read the same."""
    return f"{(Decimal(repr(float(fraction))) * 100).normalize():f}"


def _scalar(value: Any) -> Any:
    number = isinstance(value, int | float) and -MOST <= value <= MOST  # NaN is neither
    if number or value is None or isinstance(value, str):
        return value
    raise ValueError("text, a finite number, true, false or null")


Scalar = Annotated[Any, pydantic.AfterValidator(_scalar)]


class Unstructured(Schema):
    """Any weights; `per-output` compares within each output."""

    kind: Literal["unstructured", "per-output"]
    sparsity: float = Field(ge=0, lt=1)

    def __str__(self) -> str:
        return f"{percent(self.sparsity)} %" + " per output" * (self.kind == "per-output")


class NM(Schema):
    """n of every m consecutive inputs of an output are kept."""

    kind: Literal["nm"]
    n: int = Field(ge=1, le=2**31)
    m: int = Field(ge=1, le=2**31)

    @pydantic.model_validator(mode="after")
    def _some_go(self) -> "NM":
        if self.n >= self.m:
            raise ValueError("n below m")
        return self

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class Given(Schema):
    """The mask was made elsewhere: `mask` is its name, as a recipe has it."""

    kind: Literal["given"]
    mask: str

    def __str__(self) -> str:
        return f"the mask {self.mask}"


Pattern = Annotated[Unstructured | NM | Given, Field(discriminator="kind")]


class Plain(Schema):
    """One of the methods with its options."""

    kind: Literal["method"]
    name: str
    options: dict[str, Scalar]

    def __str__(self) -> str:
        return self.name


class Crossed(Schema):
    """One method's mask, another's update."""

    kind: Literal["crossed"]
    mask: "Method"
    update: "Method"

    def __str__(self) -> str:
        return f"{self.mask} mask, {self.update} update"


class Finished(Schema):
    """A method, and the options of the solver that finishes its weights."""

    kind: Literal["finished"]
    method: "Method"
    finish: dict[str, Scalar]

    def __str__(self) -> str:
        return f"{self.method}, {self.finish.get('steps')} steps to finish"


Method = Annotated[Plain | Crossed | Finished, Field(discriminator="kind")]


class Importance(Schema):
    """See `sensitivity.Importance`."""

    token_power: float = Field(default=0.0, ge=0)
    weigh_outputs: bool = False
    spread: float = Field(default=0.0, ge=0, lt=1)
    sensitivity_windows: PositiveInt | None = None


class Tuning(Schema):
    """See `tuning.Tuning`."""

    tune_epochs: float = Field(default=0.0, ge=0)
    tune_rate: float = Field(default=0.001, gt=0)
    tune_windows: PositiveInt = 1


class Recipe(Schema):
    """All that a `recipe.Recipe` is made of."""

    method: Method
    pattern: Pattern
    preset: str | None = None
    asymmetry: float = Field(default=0.0, ge=0, le=1)
    importance: Importance = Importance()
    tuning: Tuning = Tuning()

    @property
    def target(self) -> str:
        """The pattern or the mask's source, in words."""
        return f"{self.pattern}" + " in total" * (self.importance.spread > 0)

    @property
    def how(self) -> str:
        """The method and what is done beside it, in words."""
        words = [
            str(self.method),
            *["tokens weighed"] * (self.importance.token_power > 0),
            *["outputs weighed"] * self.importance.weigh_outputs,
            *[f"sparsities within {self.importance.spread:g}"] * (self.importance.spread > 0),
            *[f"asymmetry {self.asymmetry:g}"] * (self.asymmetry > 0),
            *[f"{self.tuning.tune_epochs:g} epochs of tuning"] * (self.tuning.tune_epochs > 0),
        ]
        return f"{self.preset}: " * (self.preset is not None) + ", ".join(words)


class Calibration(Schema):
    """The shape of the windows of token ids, and their digest."""

    windows: tuple[Count, Count]
    sha256: str


class TextQuality(Schema):
    """What a checkpoint makes of a text; null stands for a number that is not finite, or was not measured."""

    windows: tuple[Count, Count]
    perplexity: float | None = Field(default=None, gt=0)
    ratio: float | None = None
    kl: float | None = None
    top1: float | None = None


class MeanAccuracy(Schema):
    acc: float | None = None
    acc_stderr: float | None = None


class Quality(Schema):
    """See `evaluation.quality.Quality`."""

    texts: dict[str, TextQuality] = {}
    tasks: dict[str, dict[str, float | None]] = {}
    mean_accuracy: MeanAccuracy = MeanAccuracy()
    seconds: Seconds = {}


class Linear(Schema):
    """One pruned linear; see `linears.LinearResult`."""

    error: float | None
    zeros: Count
    wanted: Count
    size: int = Field(ge=1, le=2**53)
    stats: dict[str, float | None] = {}

    @pydantic.model_validator(mode="after")
    def _no_more_than_all(self) -> "Linear":
        if max(self.zeros, self.wanted) > self.size:
            raise ValueError("no more zeros than weights")
        return self


class Layer(Schema):
    index: Count
    seconds: Seconds
    linears: dict[str, Linear] = Field(min_length=1)

    @property
    def zeros(self) -> int:
        return sum(linear.zeros for linear in self.linears.values())

    @property
    def size(self) -> int:
        return sum(linear.size for linear in self.linears.values())


class Config(pydantic.BaseModel):
    """The options; those that the report shows by name, and all others as they were."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    out: str | None = None


class RunConfig(Config):
    ckpt: str
    calib: str | None = None


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


class Run(Recipe, Environment):
    """The record of a run."""

    version: Literal[2] = Field(alias="schema")
    kind: Literal["run"]
    config: RunConfig
    checkpoint: str = ""
    calibration: Calibration
    sparsity: float = Field(ge=0, le=1)
    evaluation: dict[Literal["dense", "pruned"], Quality]
    seconds: Seconds
    timing: Timing | None = None
    peak_bytes: dict[str, Count] = {}
    layers: list[Layer]
    resumed_layers: Count = 0


class Measured(Schema):
    """A checkpoint of an evaluation; `run` is the record of the run that made it, where there is one."""

    sparsity: float = Field(ge=0, le=1)
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


class _Head(Schema):
    version: PositiveInt = Field(default=1, alias="schema")
    kind: Literal["run", "evaluation"]


def load(path: Path) -> Record:
    """The record in a folder, or in a file; one of version 1 as if it were written today.

    Raises:
        UserError: there is none, or it is none that this version of jaxprune reads.
    """
    file = path / RECORD if os.path.isdir(path) else path
    return read(read_bytes(file, RECORD_BYTES), file)


def read(content: str | bytes, file: str | Path) -> Record:
    """A record's JSON; errors as for `load`."""
    head = parse(_Head, content, file=file)
    if head.version == 1:
        from jaxprune.reporting import version1

        return version1.upgraded(content, head.kind, file)
    if head.version != VERSION:
        raise DamagedError(
            "it was written by another version of jaxprune", file=file, entry="schema", found=head.version, wanted="2"
        )
    return parse(Run, content, file=file) if head.kind == "run" else parse(Evaluation, content, file=file)


def run_of(folder: Path) -> Run | None:
    """The record of the run that made a checkpoint's folder; None where there is none; errors as for `load`."""
    if not os.path.lexists(folder / RECORD):
        return None
    record = load(folder)
    return record if isinstance(record, Run) else None


def as_json(record: pydantic.BaseModel) -> dict[str, Any]:
    """What `read` made a record of."""
    return record.model_dump(mode="json", by_alias=True)


def write(value: Any) -> str:
    """JSON text that any parser reads: what is not finite is null, and what is no text (a file's name) is escaped."""
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The same JSON with null for what is not finite, and escapes for what is no text."""
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_text(name: str) -> str:
    """A name that UTF-8 can hold; a file's may have bytes that are none."""
    return name.encode("utf-8", "backslashreplace").decode()
