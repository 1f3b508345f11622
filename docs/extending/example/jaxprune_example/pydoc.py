"""Docstrings of the modules of Python's standard library: text that every machine has."""

import ast
import sysconfig
from collections.abc import Sequence
from pathlib import Path

PACK = True


def documents(split: str) -> Sequence[str]:
    """Returns one document a module; every fourth is of the "test" split, which evaluates."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    wanted = [file for index, file in enumerate(files) if (index % 4 == 3) == (split == "test")]
    return [text for file in wanted if (text := docstrings(file))]


def docstrings(file: Path) -> str:
    """Returns the docstrings of a module, its classes and functions."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(
        text for node in nodes if isinstance(node, documented) and (text := ast.get_docstring(node))
    )
