"""python -m jaxprune COMMAND ...: one table of commands."""

import ast
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from convert import command, plugins
from convert.errors import UserError
from jaxprune import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status. One that begins with a flag is `jaxprune prune`'s."""
    given = list(sys.argv[1:] if argv is None else argv)
    first = given[0] if given else "--help"
    if first in ("-h", "--help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"jaxprune {version('jaxprune')}")
        return 0
    name, rest = ("prune", given) if first.startswith("-") else (first.replace("-", "_"), given[1:])
    found = []

    def load(argv: Sequence[str]) -> None:
        del argv
        try:
            found.append(plugins.load(commands, name))
        except UserError as error:
            raise UserError(str(error).replace("_", "-")) from None

    return command.run(load, []) or found[0].main(rest)


def usage() -> str:
    """What `jaxprune --help` prints."""
    rows = [f"  {name.replace('_', '-'):10} {summary(name)}" for name in plugins.names(commands)]
    return "\n".join(
        [
            "usage: jaxprune COMMAND ...",
            "",
            "One-shot pruning of language models in JAX, one layer in memory at a time.",
            "",
            *rows,
            "",
            "jaxprune COMMAND --help says more. Without a command, jaxprune --ckpt ... prunes.",
        ]
    )


def summary(name: str) -> str:
    """The first sentence of a command's file, which is not imported."""
    file = Path(commands.__path__[0]) / f"{name}.py"
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0].partition(": `")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
