"""Make one HTML page about several runs and evaluations."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.command import ArgumentParser
from convert.ownership import destination
from convert.paths import require_apart
from jaxprune.commands.terminal import console, run_main
from jaxprune.errors import InputError
from jaxprune.reporting import schema
from jaxprune.reporting.report import page, save
from jaxprune.reporting.schema import RECORD


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="jaxprune report",
        description="One HTML page about several runs and evaluations.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of a run, or of an evaluation")
    parser.add_argument("--out", required=True, help="the page to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an unchanged earlier page")
    args = parser.parse_args(argv)
    place = destination(args.out, "out", overwrite=args.overwrite, folder=False)
    require_apart({"the record": [folder / RECORD for folder in args.folders]}, {"out": place.path}, error=InputError)
    place.check()
    save(place, page([schema.load(folder) for folder in args.folders]))
    console.print(os.path.relpath(place.path))


if __name__ == "__main__":
    sys.exit(main())
