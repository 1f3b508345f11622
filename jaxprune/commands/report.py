"""Create one HTML page about several runs and evaluations."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from convert.destination import destination
from convert.paths import require_apart
from jaxprune.commands.command_line import CommandLine, Section, make
from jaxprune.commands.terminal import command, console
from jaxprune.errors import InputError
from jaxprune.reporting import record as records
from jaxprune.reporting.record import RECORD
from jaxprune.reporting.report import page, save

EXAMPLES = """Examples:

    jaxprune report ./pruned-a ./pruned-b evaluation --out report.html"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the page goes."""

    out: str
    """The page to create."""
    overwrite: bool = False
    """Replace an earlier page, unless it has been changed since."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    given = CommandLine(argv, __name__).read(
        Section("Result", Options),
        positionals={"folders": "Folders of runs and of evaluations."},
        several=True,
    )
    folders, page_options = [Path(folder) for folder in given["folders"]], make(Options, given)
    place = destination(page_options.out, "out", overwrite=page_options.overwrite, folder=False)
    require_apart(
        {"the record": [folder / RECORD for folder in folders]},
        {"out": place.path},
        error=InputError,
    )
    place.check()
    save(place, page([records.load(folder) for folder in folders]))
    console.print(os.path.relpath(place.path))
