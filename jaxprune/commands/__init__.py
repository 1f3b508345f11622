"""The command line: all that prints, exits or names a flag; one command a file.

A command's file exposes `main(argv)`, a function under `terminal.command`, which runs a command
line and returns its exit status. Its name is the file's. The file's docstring is what its --help
says of it, and the first sentence what `jaxprune --help` says; `EXAMPLES` stand below its help.
"""

HELPERS = (
    "computation_options",
    "config",
    "config_file",
    "eval_options",
    "options",
    "progress",
    "recipe_options",
    "terminal",
)
"""Modules that hold no command."""
