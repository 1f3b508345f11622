"""lm-eval's own command line, with jaxprune's model.

jaxprune lm-eval run --model jaxprune --model_args pretrained=DIR --tasks boolq,rte
"""

import sys
from collections.abc import Sequence

from jaxprune.commands.terminal import command, keep_memory
from jaxprune.errors import InputError
from jaxprune.evaluation.tasks import not_installed


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    sys.argv[1:] = argv  # lm-eval reads the command line itself
    keep_memory(large=True)
    try:
        from lm_eval.__main__ import cli_evaluate

        from jaxprune.evaluation import lm  # noqa: F401  registers the model
    except ImportError as error:
        raise not_installed(error) from error
    try:
        cli_evaluate()
    except ConnectionError as error:  # of datasets and the hub
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the data for lm-eval cannot be downloaded ({reason}): connect to the hub once, "
            "or read the tasks' rows from a folder with jaxprune evaluate --tasks-data"
        ) from error
