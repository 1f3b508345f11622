"""Measure checkpoints, dense or pruned: perplexity, KL divergence, zero-shot accuracy."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convert import open_checkpoint, ownership
from convert.command import ArgumentParser
from convert.hub import resolve
from convert.paths import inputs_of, paths_of, require_apart
from jaxprune import calibration
from jaxprune.commands.eval_options import EvalOptions, with_defaults
from jaxprune.commands.flags import add_fields, make
from jaxprune.commands.terminal import choose_device, console, keep_memory, print_table, run_main
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Evaluator, Quality, table
from jaxprune.evaluation.verification import zeros
from jaxprune.models import model_for
from jaxprune.reporting import schema
from jaxprune.reporting.record import environment, write_record
from jaxprune.reporting.report import REPORT
from jaxprune.reporting.schema import RECORD
from jaxprune.streaming import hidden_states as hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvalOptions):
    """Options of an evaluation."""

    against: str | None = None
    """The dense checkpoint, for KL divergence and its own figures (default: the others are not compared)."""
    out: str = "evaluation"
    """The folder for jaxprune.json, report.html and lm-eval's results."""
    overwrite: bool = False
    """Replace an evaluation that is there already, if nobody changed it."""


def evaluate(config: Config, names: Sequence[str]) -> dict[str, Quality]:
    """Measures checkpoints and writes what was found, checkpoint by checkpoint.

    Args:
        config: defaults filled in.
        names: of the checkpoints, as for `convert.open_checkpoint`.

    Returns:
        Name -> its quality.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    place = ownership.destination(config.out, "out", overwrite=config.overwrite)
    place.check()
    if schema.run_of(place.path):
        raise place.occupied("it is a run's folder, whose record would be replaced")
    scratch = config.scratch_folder(config.out)
    names = list(dict.fromkeys([*([config.against] if config.against else []), *names]))
    if len(short := {_file_name(name) for name in names}) < len(names):
        raise InputError(f"checkpoints of the same name cannot be told apart: {', '.join(sorted(short))}")
    choose_device(config.device)
    sources = {name: resolve(name) for name in names}
    place.inputs = _require_separate(config, sources.values(), place.path)
    readers = {name: open_checkpoint(source) for name, source in sources.items()}
    for name, reader in readers.items():
        console.print(f"opening {name}")
        model_for(reader)
    runs = {name: schema.run_of(Path(name).expanduser()) for name in names}
    evaluator = Evaluator(config, readers[names[0]])
    sparsity = {name: _share(zeros(reader).values()) for name, reader in readers.items()}
    record: dict[str, Any] = {
        "schema": schema.VERSION,
        "kind": "evaluation",
        "config": dataclasses.asdict(config),
        "against": config.against,
        "checkpoints": {},
        **environment(),
    }
    qualities, fault = {}, None
    with hidden.kept_in(scratch):
        for name, quality in evaluator.measure(readers, config.against):
            qualities[name], run = quality, runs[name]
            record["checkpoints"][name] = {
                "sparsity": sparsity[name],
                "run": run and schema.as_json(run),
                "quality": quality.as_json(),
            }
            named = {_file_name(one): quality for one, quality in qualities.items()}
            with ownership.staged(place) as folder:  # what is measured is kept, whatever becomes of the rest
                files, fault = write_record(folder, record, named)
                ownership.mark(folder, "evaluation", files)
            console.print(f"measured {name}")
    header, rows = table({_file_name(name): quality for name, quality in qualities.items()})
    print_table([["zeros of the linears", *(f"{100 * share:.4f} %" for share in sparsity.values())], *rows], header)
    if fault:
        raise fault
    console.print(f"{os.path.relpath(place.path)}: {RECORD}, {REPORT}")
    return qualities


def _require_separate(config: Config, sources: Iterable[Path], out: Path) -> tuple[Path, ...]:
    """All that an evaluation reads; InputError where it would make something there."""
    texts = (config.eval_text or "").split(",")
    inputs = {
        "a checkpoint": [path for source in sources for path in inputs_of(source)],
        "eval_text": [path for text in texts for path in paths_of(text)],
        "tasks_data": paths_of(config.tasks_data),
        "scratch": paths_of(config.scratch),
    }
    require_apart(inputs, {"out": out}, error=InputError, around="scratch")
    return tuple(path for name, ones in inputs.items() if name != "scratch" for path in ones)


def _share(counts: Iterable[tuple[int, int]]) -> float:
    zeros, sizes = zip(*counts, strict=True)
    return sum(zeros) / sum(sizes)


def _file_name(name: str) -> str:
    return Path(name).absolute().name


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Reads a command line: options, and the checkpoints' names.

    Raises:
        UserError: a flag or a value that cannot be used.
    """
    parser = ArgumentParser(
        prog="jaxprune evaluate",
        description="Measure perplexity, KL divergence and zero-shot accuracy of checkpoints, dense or pruned.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="DIR", help="a folder, a .gguf file, a known name, or owner/name"
    )
    add_fields(parser, Config)
    given = vars(parser.parse_args(argv))
    names = given["checkpoints"]
    text = calibration.default_text(names[0]) or calibration.default_text(given.get("against", "")) or "wikitext2"
    config = with_defaults(make(Config, given), eval="ppl,zero-shot", eval_text=text, eval_seqlen=2048)
    return config, names


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    keep_memory(large=True)
    evaluate(*parse(argv))


if __name__ == "__main__":
    sys.exit(main())
