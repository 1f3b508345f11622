"""The run-time type checker of the tests: as type checkers do, it takes an int for a float."""

import re
from pathlib import Path

import beartype
import jaxtyping
from beartype.claw import beartype_packages

PACKAGES = ("jaxprune", "convert")
CONF = beartype.BeartypeConf(is_pep484_tower=True)

check = beartype.beartype(conf=CONF)


def install(root: Path) -> None:
    """Has signatures checked of what is imported from now on: by beartype, and by jaxtyping where
    modules name shapes.

    jaxtyping also passes over names that a module has for type checkers only.
    """
    beartype_packages(PACKAGES, conf=CONF)
    shaped = []
    for file in (file for package in PACKAGES for file in (root / package).rglob("*.py")):
        module = file.parent if file.stem == "__init__" else file.with_suffix("")
        shapes = re.search(
            "^from jaxtyping import (?!DTypeLike$)|^if TYPE_CHECKING",
            file.read_text(),
            re.MULTILINE,
        )
        # a package's own name would stand for all of its modules
        if shapes and module.parent != root:
            shaped.append(".".join(module.relative_to(root).parts))
    jaxtyping.install_import_hook(shaped, f"{__name__}.check")
