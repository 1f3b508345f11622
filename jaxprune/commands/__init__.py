"""The command line: all that prints, exits or names a flag; one command a file.

A command's file exposes `main(argv)`, a function under `terminal.command`, which runs a command
line and returns its exit status. Its name is the file's. The file's docstring is what its --help
says of it, and the first sentence what `jaxprune --help` says; `EXAMPLES` stand below its help.
"""

HELPERS = (
    "command_line",
    "computation_options",
    "config_file",
    "eval_options",
    "progress",
    "recipe_options",
    "run_options",
    "terminal",
)
"""Modules that hold no command."""
