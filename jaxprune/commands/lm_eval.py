"""lm-eval's own command line, with jaxprune's model.

jaxprune lm-eval run --model jaxprune --model_args pretrained=DIR --tasks boolq,rte
"""

import sys
from collections.abc import Sequence

from jaxprune.commands.terminal import keep_memory, run_main
from jaxprune.evaluation.tasks import not_installed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs lm-eval's command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    sys.argv[1:] = argv  # lm-eval reads the command line itself
    keep_memory(large=True)
    try:
        from lm_eval.__main__ import cli_evaluate

        from jaxprune.evaluation import lm  # noqa: F401  registers the model
    except ImportError as error:
        raise not_installed(error) from error
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
