"""Records read."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from convert.errors import DamagedError
from convert.files import read_bytes
from convert.paths import paths_of
from convert.schema import Schema, parse
from jaxprune.reporting.schema import RECORD, RECORD_BYTES, VERSION, Evaluation, Record, Run


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
