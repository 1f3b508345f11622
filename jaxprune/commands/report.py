"""Make one HTML page about several runs and evaluations."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.destination import destination
from convert.paths import require_apart
from jaxprune.commands.options import CommandLine, Section, make
from jaxprune.commands.terminal import console, run_main
from jaxprune.errors import InputError
from jaxprune.reporting import reading
from jaxprune.reporting.report import page, save
from jaxprune.reporting.schema import RECORD


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


@dataclasses.dataclass(frozen=True)
class Options:
    """The page."""

    out: str
    """The page to make."""
    overwrite: bool = False
    """Replace an earlier page that nobody changed."""


def _main(argv: Sequence[str]) -> None:
    given = CommandLine(argv).read(
        "jaxprune report",
        "Make one HTML page about several runs and evaluations.",
        [Section("Result", Options)],
        positionals={"folders": "Folders of runs and of evaluations."},
        several=True,
        examples="Examples:\n\n    jaxprune report ./pruned-a ./pruned-b evaluation --out "
        "report.html",
    )
    folders, page_options = [Path(folder) for folder in given["folders"]], make(Options, given)
    place = destination(page_options.out, "out", overwrite=page_options.overwrite, folder=False)
    require_apart(
        {"the record": [folder / RECORD for folder in folders]},
        {"out": place.path},
        error=InputError,
    )
    place.check()
    save(place, page([reading.load(folder) for folder in folders]))
    console.print(os.path.relpath(place.path))


if __name__ == "__main__":
    sys.exit(main())
