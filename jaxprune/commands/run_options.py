"""The options of a run, beside its recipe."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from convert.schema import check, dump
from jaxprune import calibration
from jaxprune.commands.command_line import (
    CommandLine,
    Section,
    fields_in,
    make,
    require_at_least,
    require_positive,
    whole,
)
from jaxprune.commands.computation_options import StreamingOptions
from jaxprune.commands.eval_options import MEASURE_OF, EvalOptions, split, with_defaults
from jaxprune.commands.recipe_options import RecipeOptions
from jaxprune.errors import InputError
from jaxprune.processes.control import Group
from jaxprune.recipe import Recipe
from jaxprune.sharding import MOST_DEVICES

MOST_PORT = 2**16 - 1
"""The port after the coordinator's is used as well."""
PRUNE = "jaxprune.commands.prune"
"""The module of the command whose options these are."""
OF_A_PROCESS = ("coordinator", "process_id", "scratch")
"""Options that may differ between the processes of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """Where a run reads and writes."""

    ckpt: str
    """The dense checkpoint: a known name such as llama-7b, a folder, a .gguf file, or owner/name on
    the hub. Required, here or in --config."""
    out: str | None = None
    """The folder to create (default: in the current folder, named after checkpoint, method and
    pattern)."""
    overwrite: bool = False
    """Replace --out (and --save-masks) if it exists, once the new result is complete."""
    resume: bool = False
    """Fail unless there is a stopped run to resume. Without this option, the same command also
    resumes a stopped run: progress is saved in OUT.unfinished until the run ends."""
    save_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """The dtype of the result's weights (default: the checkpoint's; float16 for a quantized GGUF
    file)."""
    save_masks: str | None = None
    """Also write the masks to this file, as packed bits in safetensors, for fine-tuning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The text of a run."""

    calib: str | None = None
    """Calibration text: c4, wikitext2, wikipedia, a file (.jsonl, .json.gz, .parquet, .txt, or .npy
    with token ids [count, length]), or a folder in the hub's layout (default: c4; wikipedia for
    smollm2-135m). Rows contain text, or messages for the checkpoint's chat template. To mix
    sources, separate them by commas and add weights: c4:3,chats.jsonl:1."""
    tune_text: str | None = None
    """The text for --tune-tokens, named as for --calib (default: the calibration text). It can be
    text that jaxprune generate made."""
    nsamples: int = 128
    """Number of calibration windows."""
    seqlen: int = 2048
    """Number of tokens of a calibration window."""
    pack: bool = False
    """Join documents to fill calibration windows, instead of skipping documents that are shorter
    than a window."""
    seed: int = 0
    """Seed for the choice of calibration windows. The same seed gives the same result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions(StreamingOptions):
    """What a run is computed on."""

    devices: int | None = None
    """Number of devices of each process (default: all; 1 on a CPU, which can be divided)."""
    coordinator: str | None = None
    """Run on several hosts: host:port of the first process, with --processes and --process-id. Or
    auto, which asks SLURM, Open MPI or a TPU pod. The run also uses the next port. All hosts must
    have access to --ckpt and --out."""
    processes: int | None = None
    """Number of processes, usually one per host."""
    process_id: int | None = None
    """Index of this process, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is asked before a run."""

    dry_run: bool = False
    """Only print what the run would need (device and host memory, disk, FLOPs, time), and whether
    it fits. This reads only config.json, and the headers of the weights if they are there."""
    device_memory: float | None = None
    """Plan for a device with this much memory in GiB, instead of this machine's device."""
    target: str | None = None
    """Plan for other hardware: h100, a100, rtx4090, v5e, v5p, v6e, or several of them. The plan
    uses the hardware's own compiler if it is installed. --devices gives the number."""
    unchecked: bool = False
    """Start even if the run does not seem to fit, and without comparing weights from the hub with
    their digests."""
    timing: Literal["jit-vs-eager"] | None = None
    """Before the run, prune the first layer compiled and under jax.disable_jit, and print the
    seconds of both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PlanOptions, MachineOptions, EvalOptions, CalibrationOptions, ResultOptions):
    """All options of a run except the recipe."""

    def meeting(self, recipe: Recipe) -> tuple[Group, dict[str, Any]] | None:
        """Returns the processes of the run, and what all of them have to be asked alike; None: this
        is the only one.

        Raises:
            InputError: `auto` does not find them.
        """
        if self.coordinator is None:
            return None
        from jaxprune.reporting.recording_observer import versions  # takes a second to import

        options = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in OF_A_PROCESS
        }
        asked = {**options, "recipe": dump(recipe), "versions": versions()}
        return Group.of(self.coordinator, self.processes, self.process_id), asked

    def resolved(self, recipe: Recipe) -> "Config":
        """Returns the same run with the defaults that depend on other options filled in.

        Raises:
            InputError: options that no run can have.
        """
        require_positive(self, "nsamples", "devices", "processes")
        require_at_least(self, 2, "seqlen")
        require_at_least(self, 0, "seed", "process_id")
        if self.devices is not None and self.devices > MOST_DEVICES:
            raise InputError(f"--devices must be at most {MOST_DEVICES}, not {self.devices}")
        if self.device_memory is not None and not 0 < self.device_memory < math.inf:
            raise InputError(
                f"--device-memory must be a positive number of GiB, not {self.device_memory}"
            )
        _require_processes(self.coordinator, self.processes, self.process_id)
        if self.tune_text and not recipe.tuning.tune_tokens:
            wanted = "pass --tune-tokens with it, and not 0, or leave it out"
            raise InputError(f"--tune-text does nothing by itself: {wanted}")
        default_text = calibration.default_text(self.ckpt)
        filled = with_defaults(
            self, eval="ppl", eval_text=default_text or "wikitext2", eval_seqlen=self.seqlen
        )
        return dataclasses.replace(
            filled,
            out=self.out
            or f"{Path(self.ckpt).absolute().name.removesuffix('.gguf')}-{recipe.slug}",
            calib=self.calib or default_text or "c4",
        )


def _require_processes(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Raises InputError for a coordinator or numbers of processes that cannot be."""
    numbers = [processes is not None, number is not None]
    if any(numbers) if coordinator in (None, "auto") else not all(numbers):
        raise InputError(
            "--coordinator HOST:PORT, --processes and --process-id go together, or --coordinator "
            "auto"
        )
    if coordinator is None or processes is None or number is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]", host) or not re.fullmatch(
        r"[0-9]{1,5}", port
    ):
        raise InputError(f"--coordinator takes HOST:PORT or auto, not {coordinator!r}")
    if not 0 < int(port) < MOST_PORT:
        raise InputError(f"--coordinator takes a port from 1 to {MOST_PORT - 1}, not {port}")
    if not 0 <= number < processes:
        raise InputError(f"--process-id must be below --processes, {processes}, not {number}")


def group_of(argv: Sequence[str]) -> Group | None:
    """Returns the processes of a command line that need not be valid otherwise; None: it does not
    say them."""
    try:
        line = CommandLine(argv, repeats=True)
        coordinator = line.value("coordinator")
        texts = [line.value(name) for name in ("processes", "process_id")]
        processes, number = (whole(text) if text else None for text in texts)
        _require_processes(coordinator, processes, number)
        return Group.of(coordinator, processes, number) if coordinator else None
    except ValueError:  # UserError is one
        return None


class Asked(NamedTuple):
    """A command line that takes the options of a run.

    Attributes:
        given: all that was given.
        config: the options of the run.
        recipe: its recipe.
        sparsity: the sparsity that the user typed; None: the recipe's is a default, a preset's or a
            record's.
    """

    given: dict[str, Any]
    config: Config
    recipe: Recipe
    sparsity: float | None


def parse(argv: Sequence[str]) -> tuple[Config, Recipe]:
    """Reads a command line of `jaxprune prune`.

    Raises:
        UserError: a flag or a value that cannot be used.
        SystemExit: after --help.
    """
    asked = read(argv, PRUNE)
    return asked.config, asked.recipe


def read(
    argv: Sequence[str],
    module: str,
    own: Sequence[Section] = (),
    positionals: Mapping[str, str] = MappingProxyType({}),
) -> Asked:
    """Reads a command line that takes the options of a run.

    Args:
        argv: the command line.
        module: the name of the command's module.
        own: flags of its own.
        positionals: name -> help text of what comes without a flag.

    Raises:
        UserError: a flag or a value that cannot be used.
        SystemExit: after --help.
    """
    line = CommandLine(argv, module, repeats=True)
    chosen = RecipeOptions(line)
    section = partial(Section, defaults=line.repeated)
    given = line.read(
        *own,
        section("Checkpoint and result", ResultOptions),
        *chosen.sections(),
        section("Calibration", CalibrationOptions),
        section("Evaluation", EvalOptions),
        section("Machine", MachineOptions),
        section("Before the run", PlanOptions),
        positionals=positionals,
        elsewhere=chosen.elsewhere,
    )
    recipe = chosen.recipe(given)
    config = _amended(line, given, recipe).resolved(recipe)
    return Asked(given, config, recipe, given.get("sparsity"))


NOT_REPEATED = {
    "out",
    "overwrite",
    "resume",
    "save_masks",
    "scratch",
    "dry_run",
    "coordinator",
    "processes",
    "process_id",
}
"""Options of a record's run that say where it was made, not what."""


def _amended(line: CommandLine, given: Mapping[str, Any], recipe: Recipe) -> Config:
    """Returns the options that flags give, beside those of a record's run, without what means
    nothing then."""
    if line.record is None:
        return make(Config, given)
    unset = set(NOT_REPEATED)
    if "eval" in given:
        measures = split(given["eval"])
        unset |= {name for name, measure in MEASURE_OF.items() if measure not in measures}
    if "target" in given:
        unset.add("device")
    if not recipe.tuning.tune_tokens:
        unset.add("tune_text")
    base = dict(line.repeated)
    if line.record.save_dtype:
        base["save_dtype"] = line.record.save_dtype
    if "ckpt" in given:  # another checkpoint may have another default
        unset.add("save_dtype")
    base = {name: value for name, value in base.items() if name not in unset}
    values = base | fields_in(given, Config)
    return check(Config, values, file=given["config"], entry="config", error=InputError)
