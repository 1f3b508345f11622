"""Checks that the inputs and outputs of a command do not overlap."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from convert.errors import Change, UserError


def require_apart(
    inputs: Mapping[str, Iterable[Path]],
    outputs: Mapping[str, Path],
    *,
    error: type[UserError],
    around: str = "",
) -> None:
    """Refuses an output that is, contains or lies in an input or another output.

    Links are followed, even if the end of a path does not exist yet. Parents are compared as files
    on the disk, not by their spelling.

    Args:
        inputs: option -> the paths that are read for it; missing ones cannot overlap.
        outputs: option -> the path that is written for it. `x.y` is written on behalf of the option
            x. A name that is not an identifier is used only in the text of the error.
        error: the class to raise.
        around: an input that may contain outputs, such as a folder for scratch files.

    Raises:
        UserError: the first overlap, with both options.
    """
    made = list(outputs.items())
    for number, (option, path) in enumerate(made):
        for other, ones in inputs.items():
            for one in ones:
                if os.path.exists(one):
                    _require_apart(option, path, other, one, error, nested=other != around)
        for other, one in made[:number]:
            _require_apart(option, path, other, one, error)


def paths_of(text: str | None) -> list[Path]:
    """Returns the existing path that an option names, or an empty list if it names something
    else."""
    try:
        path = Path(text or "").expanduser()
        return [path] if text and path.exists() else []
    except (OSError, RuntimeError, ValueError):
        return []


def inputs_of(path: Path) -> list[Path]:
    """Returns everything that is read for a path: the path, and the links in a folder, as in the
    hub's cache."""
    found = [path]
    if path.is_dir():
        found += [one for one in path.iterdir() if one.is_symlink()]
    return found


def _require_apart(
    option: str, path: Path, other: str, one: Path, error: type[UserError], *, nested: bool = True
) -> None:
    if contains(one, path) and contains(path, one):
        relation = f"it is also what is given as {other}"
    elif contains(path, one):
        relation = f"it holds {one}, which is given as {other}"
    elif nested and contains(one, path):
        relation = f"it is inside {one}, which is given as {other}"
    else:
        return
    names = [name.partition(".")[0] for name in (option, other)]
    raise error(
        relation, file=path, options={name: Change.OTHER for name in names if name.isidentifier()}
    )


def contains(folder: Path, path: Path) -> bool:
    """Returns whether a path is a folder or lies in it, according to the disk."""
    anchor, rest = next(_ways(folder))
    for place, more in _ways(path):
        if os.path.samefile(place, anchor):
            if not _minds_case(anchor):
                rest, more = [name.casefold() for name in rest], [name.casefold() for name in more]
            return more[: len(rest)] == rest
    return False


def _ways(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields the existing paths at and above a path, nearest first, each with the names from there
    to the path."""
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        if os.path.exists(place):
            yield place, list(real.parts[len(place.parts) :])


def _minds_case(folder: Path) -> bool:
    """Returns whether names that differ in case are different in a folder."""
    other = folder.with_name(folder.name.swapcase())
    return other.name == folder.name or not (
        os.path.exists(other) and os.path.samefile(other, folder)
    )
