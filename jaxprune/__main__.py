"""python -m jaxprune COMMAND ...: one table of commands, which imports nothing but the one that is
asked for."""

import ast
import difflib
import importlib
import pkgutil
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jaxprune import commands

ORDER = (
    "prune",
    "evaluate",
    "verify",
    "report",
    "plan",
    "generate",
    "snapshot",
    "solve",
    "convert",
    "push",
    "lm-eval",
)
"""In which the help names commands; others come after."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status. One that begins with a flag is `jaxprune
    prune`'s."""
    if argv is None:
        stop_at_once()
    given = list(sys.argv[1:] if argv is None else argv)
    first = given[0] if given else "--help"
    if first in ("-h", "--help"):
        return _printed(usage())
    if first == "--version":
        return _printed(f"jaxprune {version('jaxprune')}")
    name, rest = ("prune", given) if first.startswith("-") else (first, given[1:])
    if name not in (known := names()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"error: no command {ascii(name)}: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"jaxprune.commands.{name.replace('-', '_')}").main(rest)


def stop_at_once() -> None:
    """Lets Ctrl-C end this process until `convert.command` takes over: what is imported meanwhile
    swallows Python's exception, or crashes of it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _printed(text: str) -> int:
    """Prints a text; returns the exit status."""
    try:
        print(text, flush=True)
    except OSError as error:
        from convert.command import end_output  # which imports more than a help needs

        return end_output(error)[0]
    return 0


def names() -> list[str]:
    """Returns the names of the commands, in the order of the help."""
    found = (module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))
    own = [name for name in found if name.replace("-", "_") not in commands.HELPERS]
    return sorted(own, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def usage() -> str:
    """Returns what `jaxprune --help` prints."""
    rows = [f"  {name:10} {summary(name)}" for name in names()]
    return "\n".join(
        [
            "usage: jaxprune COMMAND ...",
            "",
            "Post-training pruning of language models in JAX, one layer in memory at a time.",
            "",
            *rows,
            "",
            "jaxprune COMMAND --help says more, jaxprune --version which one this is.",
            "Without a command, jaxprune --ckpt ... prunes.",
        ]
    )


def summary(name: str) -> str:
    """Returns the first sentence of a command's file, which is not imported."""
    file = Path(commands.__path__[0]) / f"{name.replace('-', '_')}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
