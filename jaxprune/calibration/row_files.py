"""Rows of .json, .jsonl and .parquet files, each as a schema has it."""

from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import TypeVar

import pydantic

from convert import schema
from convert.errors import UserError
from jaxprune.calibration.documents import decoded, lines, seekable, whole
from jaxprune.errors import InputError

S = TypeVar("S", bound=pydantic.BaseModel)


def json_rows(row: type[S], file: BufferedIOBase, path: Path) -> Iterator[S]:
    """Yields the rows of a file that holds one a line, or is one array of them.

    Args:
        row: what each has to be.
        file: open.
        path: the path of the file, for errors.

    Raises:
        InputError: a row is not what it has to be; its line and entry are named.
    """
    for place, (number, line) in enumerate(lines(file, path)):
        if place == 0 and line.lstrip().startswith(b"["):
            line += whole(file, path)
            try:
                yield from pydantic.TypeAdapter(list[row]).validate_json(line)  # type: ignore[valid-type]
            except pydantic.ValidationError as problem:
                decoded(line, path)  # which the parser calls invalid JSON
                raise schema.refused(problem, file=path, error=InputError) from None
            return
        entry = f"line {number}"
        try:
            found = schema.parse(row, line, file=path, entry=entry, error=InputError)
        except InputError:
            decoded(line, path, entry)
            raise
        yield found


def parquet_rows(row: type[S], file: BufferedIOBase, path: Path) -> Iterator[S]:
    """Yields the rows of a .parquet file; arguments and errors as for `json_rows`."""
    import pyarrow
    from pyarrow import parquet

    try:
        with seekable(file, path) as content:
            opened = parquet.ParquetFile(content)
            names = opened.schema_arrow.names
            fields = row.model_fields
            if missing := [
                name for name, field in fields.items() if field.is_required() and name not in names
            ]:
                raise InputError("a column is missing", file=path, entry=missing[0], found=names)
            number = 0
            for batch in opened.iter_batches(batch_size=256, columns=[*fields] or None):
                for values in batch.to_pylist():
                    number += 1
                    yield schema.check(
                        row, values, file=path, entry=f"row {number}", error=InputError
                    )
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"it is no .parquet file, or damaged ({error})", file=path) from error
