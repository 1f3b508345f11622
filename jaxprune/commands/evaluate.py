"""Measure checkpoints, dense or pruned: perplexity, KL divergence, zero-shot accuracy."""

import dataclasses
import os
from collections.abc import Sequence

from convert.destination import destination
from convert.hub import resolve
from convert.paths import inputs_of, paths_of, require_apart
from jaxprune import calibration
from jaxprune.api import evaluate as api
from jaxprune.api.evaluate import Evaluation
from jaxprune.api.load import load
from jaxprune.commands.command_line import CommandLine, Section, make
from jaxprune.commands.computation_options import StreamingOptions
from jaxprune.commands.eval_options import EvalOptions, with_defaults
from jaxprune.commands.progress import Progress
from jaxprune.commands.terminal import choose_devices, command, console, keep_memory
from jaxprune.errors import InputError
from jaxprune.reporting.record import RECORD, REPORT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What is compared, and where the result goes."""

    against: str | None = None
    """The dense checkpoint. It is measured too, and the others are compared with it (default: no
    comparison)."""
    out: str = "evaluation"
    """The folder to create for jaxprune.json, report.html and lm-eval's results."""
    overwrite: bool = False
    """Replace an earlier evaluation, unless it has been changed since."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamingOptions, EvalOptions, ResultOptions):
    """Options of an evaluation."""


EXAMPLES = """Examples:

    jaxprune evaluate ./pruned --against llama-7b
    jaxprune evaluate ./pruned-a ./pruned-b --eval ppl --eval-text wikitext2,mytext.txt
    jaxprune evaluate ./pruned --against llama-7b --eval samples --prompts mine.txt
    jaxprune evaluate ./pruned --eval zero-shot --tasks piqa,mmlu --limit 500"""


def evaluate(config: Config, names: Sequence[str]) -> Evaluation:
    """Measures checkpoints and writes what was found, checkpoint by checkpoint.

    Args:
        config: defaults filled in.
        names: the names of the checkpoints, as for `convert.open_checkpoint`.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    place = destination(config.out, "out", overwrite=config.overwrite)
    place.check()
    scratch, measures = config.scratch_folder(config.out), config.plan(config.device)
    measures.load()  # before a model is fetched
    choose_devices(config.device)
    given = [*([config.against] if config.against else []), *names]
    inputs = {
        "a checkpoint": [path for name in given for path in inputs_of(resolve(name))],
        **config.inputs(),
    }
    apart = inputs | {"scratch": paths_of(config.scratch)}
    require_apart(apart, {"out": place.path}, error=InputError, around="scratch")
    models = {}
    for name in dict.fromkeys(given):
        console.print(f"opening {name}")
        models[name] = load(name, dtype=config.computation_dtype, scratch=scratch)
    with Progress(tasks=bool(measures.tasks)) as progress:
        found = api.evaluate(
            *(models[name] for name in names),
            against=models[config.against] if config.against else None,
            measures=measures,
            out=place.with_inputs(inputs),
            config=dataclasses.asdict(config),
            observer=progress,
        )
    console.print(f"{os.path.relpath(place.path)}: {RECORD}, {REPORT}")
    return found


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Reads a command line: options, and the checkpoints' names.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    given = CommandLine(argv, __name__).read(
        Section("Checkpoints and result", ResultOptions),
        Section("What to measure", EvalOptions),
        Section("Machine", StreamingOptions),
        positionals={"checkpoints": "Folders, .gguf files, known names, or owner/name on the hub."},
        several=True,
    )
    names = given["checkpoints"]
    text = (
        calibration.default_text(names[0])
        or calibration.default_text(given.get("against", ""))
        or "wikitext2"
    )
    config = with_defaults(
        make(Config, given), eval="ppl,zero-shot", eval_text=text, eval_seqlen=2048
    )
    return config, names


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    keep_memory(large=True)
    evaluate(*parse(argv))
