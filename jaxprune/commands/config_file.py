"""Files of options: what --config names."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from convert.files import read_bytes
from convert.schema import decode, plain
from jaxprune.errors import InputError

if TYPE_CHECKING:
    from jaxprune.reporting.record import Run

YAML_BYTES, JSON_BYTES = 2**20, 64 * 2**20
"""The most that such a file may hold; .json, as a record, that of a thousand layers."""


class _Loader(yaml.SafeLoader):
    """Reads 2:4 as text, which YAML 1.1 takes for a number of base 60."""

    yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", re.compile(r"[-+0-9_.]+:")), *known]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load(path: Path, *, repeats: bool) -> "dict[str, Any] | Run":
    """Returns the options of a file, by their names in Python's spelling, or the record of a run.

    Args:
        path: the path of the file.
        repeats: whether a record may be given.

    Raises:
        InputError: the file holds no options.
        CheckpointError: it cannot be read.
    """
    is_json = path.suffix == ".json"
    content = read_bytes(path, JSON_BYTES if is_json else YAML_BYTES)
    if is_json:
        found: Any = decode(content, file=path, error=InputError)
    else:
        try:
            found = yaml.load(content, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(
                f"it holds no options ({' '.join(str(error).split())[:200]})", file=path
            ) from None
    if not isinstance(found, dict):
        raise InputError(
            "it holds no options", file=path, wanted="names and values, such as sparsity: 0.7"
        )
    if found.get("kind") in ("run", "evaluation"):
        if not repeats:
            raise InputError(
                "it is a record, which only prune, plan and snapshot repeat",
                file=path,
                wanted="options",
            )
        from jaxprune.reporting import record as records  # with all that a run consists of

        record = records.read(content, path)
        if not isinstance(record, records.Run):
            raise InputError(
                "it is the record of an evaluation", file=path, wanted="that of a run, or options"
            )
        return record
    return dict(_texts(found, path))


def _texts(found: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Yields name and value as on a command line, True for a flag without one; what is null, false
    or an empty list is not given."""
    for name, value in found.items():
        several = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not isinstance(name, str) or not (
            several or isinstance(value, bool | int | float | str | None)
        ):
            raise InputError(
                "an option has no single value", file=path, entry=str(plain(name)), found=value
            )
        # Python prints no number of thousands of digits
        if isinstance(value, int) and abs(value) >= 2**64:
            raise InputError("the number is too large", file=path, entry=name)
        if value is not None and value is not False and value != []:
            yield name.replace("-", "_"), value if value is True or several else str(value)
