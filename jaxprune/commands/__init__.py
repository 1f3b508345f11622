"""The command line: all that prints, exits or names a flag; one command a file.

A command's file exposes `main(argv)`, which runs a command line and returns its exit status. Its
name is the file's, and what `jaxprune --help` says of it is the first sentence of the file's
docstring.
"""

HELPERS = (
    *(
        "computation_options",
        "config",
        "config_file",
        "eval_options",
        "options",
        "progress",
        "recipe_options",
    ),
    "terminal",
)
"""Modules that hold no command."""
