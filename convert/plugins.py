"""Plugins by name: the modules of a package, and those that other installed packages offer for it.

A package's public modules are its plugins, except those that its `HELPERS` names. Another
distribution adds one by an entry point whose group is the package's name, such as
`jaxprune.methods`, and whose value is a module.
"""

import difflib
import functools
import importlib
import pkgutil
import sys
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from convert.errors import InputError


def names(package: ModuleType) -> list[str]:
    """Returns the names that `load` takes, in alphabetical order."""
    return sorted({*_modules(package), *_entry_points(package)})


def load(package: ModuleType, name: str) -> ModuleType:
    """Imports a plugin.

    Args:
        package: the package whose plugin it is.
        name: the name of the plugin; a module of the package comes before another distribution's of
            the same name.

    Raises:
        InputError: there is no such plugin, or another distribution's cannot be imported.
    """
    if name in _modules(package):
        return importlib.import_module(f"{package.__name__}.{name}")
    if entry := _entry_points(package).get(name):
        try:
            return entry.load()
        except Exception as error:  # other people's code
            raise InputError(
                f"{entry.value}, which is installed as {name!r}, cannot be imported ({error})"
            ) from error
    known = names(package)
    kind = package.__name__.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no {name!r} in {kind}: there are {', '.join(known)}{hint}")


def name_of(package: ModuleType, module: str) -> str:
    """Returns the name under which a package has a module, given by its full name, as a plugin."""
    if module.startswith(f"{package.__name__}."):
        return module.rpartition(".")[2]
    found = (name for name, entry in _entry_points(package).items() if entry.module == module)
    return next(found, module.rpartition(".")[2])


def _modules(package: ModuleType) -> list[str]:
    helpers = getattr(package, "HELPERS", ())
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in found if not name.startswith("_") and name not in helpers]


def _entry_points(package: ModuleType) -> dict[str, EntryPoint]:
    return _installed(package.__name__, tuple(sys.path))


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Returns a group's entry points of what is under `sys.path`: a file of every distribution is
    read for it."""
    return {entry.name: entry for entry in entry_points(group=group)}
