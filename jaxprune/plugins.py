"""File name = flag value: the methods, models and calibration sources are the files of their packages."""

import difflib
import importlib
import pkgutil
from types import ModuleType

from jaxprune.errors import InputError


def names(package: ModuleType) -> list[str]:
    """The names that `load` takes: the package's public modules."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(package: ModuleType, name: str) -> ModuleType:
    """Imports one module of a package by its flag value.

    Raises:
        InputError: there is no such module.
    """
    known = names(package)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no {name!r} in {kind}: there are {', '.join(known)}{hint}")
    return importlib.import_module(f"{package.__name__}.{name}")
